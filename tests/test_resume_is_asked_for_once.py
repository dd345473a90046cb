"""resume=no and resume=anyway are of the start that they were given to: no retry drops the checkpoints again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from assets import trainer
from assets.making import Maker, Output
from assets.resources import Launcher, Silent
from assets.run_config import resuming
from storage import objects
from storage.places import Places
from training import recipes
from training.config import RunConfig, from_dict

OUTPUT = Output("trained_model", "runs/r", "1", {})


@dataclass(frozen=True)
class Recorder(Launcher):
    """Starts nothing, and keeps what it was to start with."""

    arguments: list[list[str]] = field(default_factory=list)

    def run(self, module: str, arguments: Any, *rest: Any, **options: Any) -> None:
        self.arguments.append([*arguments])


@pytest.mark.parametrize("resume", ["no", "anyway"])
def test_the_start_after_the_one_that_was_asked_goes_on(resume, tmp_path: Path, request) -> None:
    store = request.getfixturevalue("s3_store") if resume == "no" else str(tmp_path / "store")
    launcher, run = Recorder(), recipes.recipe("demo")
    maker = Maker(Places(store, tmp_path / "home"), launcher, Silent())
    asked = resuming(run, resume)
    maker.define("r", asked)
    for _ in range(2):
        trainer.train(maker, "r", maker.run_config("r"), str(tmp_path / "tokens"), OUTPUT, print)
    option = "--begin-anew" if resume == "no" else "--resume-anyway"
    assert [option in arguments for arguments in launcher.arguments] == [True, False]
    local = objects.read_json(objects.join(maker.folder("runs/r"), "config.json"))
    assert from_dict(RunConfig, local) == maker.run_config("r") == run
    maker.define("r", asked, retry=True)  # of the documents, too, in the UI
    assert maker.run_config("r") == run
    maker.define("r", asked)  # somebody asks again
    assert maker.run_config("r") == asked
