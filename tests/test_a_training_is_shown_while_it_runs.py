"""A training is observed in Dagster while it runs, and goes on where that fails; without a terminal it prints lines."""

import io
import json
from pathlib import Path

import dagster as dg
import pytest
import tiny_run
from rich.console import Console

from assets import model, observer
from assets.observer import Observer
from assets.resources import RUNS, Event
from pipeline.runs import silent_maker
from pipeline.terminal import Terminal
from storage.places import places
from training.config import RunConfig

SKIPPED = "s:0 tel:10.9\ns:0 trl:nan lr:1e-4 norm:nan\ns:0 skip:inf\ns:1 trl:9.1 lr:2e-4 norm:2.2\n"


def step(number: int) -> Event:
    return {"event": "training_step", "step": number, "steps": 6, "loss": 9.1, "seconds": 60.0, "mfu": None}


def test_what_cannot_be_shown_is_said_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "OBSERVE_SECONDS", 0.0)
    place = places(str(tmp_path / "store"))
    main_log = Path(place.store, "runs/tiny/main.log")
    main_log.parent.mkdir(parents=True)
    seen: list[Event] = []

    @dg.asset(partitions_def=RUNS)
    def trained_model(context: dg.AssetExecutionContext) -> None:
        shows = Observer(context, silent_maker(place), tiny_run.config())
        for number, text in enumerate((SKIPPED, "no line of main.log", SKIPPED), start=1):
            main_log.write_text(text)
            shows.see(step(number), seen.append)

    with dg.DagsterInstance.ephemeral() as dagster:
        dagster.add_dynamic_partitions("run", ["tiny"])
        assert dg.materialize([trained_model], partition_key="tiny", instance=dagster).success
        found = dagster.fetch_observations(dg.AssetKey("trained_model"), limit=9).records
    shown = [record.asset_observation.metadata for record in found if record.asset_observation]
    assert [metadata["step"].value for metadata in shown] == [3, 1]
    assert shown[1]["hours_left"].value == pytest.approx(5 / 60)
    assert Path(str(shown[0]["plot"].value)).read_bytes().startswith(b"\x89PNG")
    (warning,) = (event["message"] for event in seen if event["event"] == "warning")
    assert warning.startswith("step 2 is not shown in Dagster, the training goes on: main.log line 1 is")


def test_the_last_steps_loss_may_be_that_of_a_skipped_update(tmp_path: Path) -> None:
    """The weights are those of the step before: no reason to block what follows, at each retry anew."""
    run: RunConfig = tiny_run.config(steps=2)
    folder = tiny_run.folder(tmp_path / "run", run)
    tiny_run.steps(folder, tiny_run.tokens(tmp_path / "tokens"))
    path = Path(folder, "metrics.jsonl")
    first, last = (json.loads(line) for line in path.read_text().splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, last | {"loss": float("nan")})))
    assert model._trained(folder, run, 1).metrics["loss"] == first["loss"]


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 10), (300.0, 4)])
def test_without_a_terminal_a_long_stage_prints_a_line_every_few_minutes(seconds: float, lines: int) -> None:
    """And at each quarter."""
    said = io.StringIO()
    terminal = Terminal(Console(file=said, width=100), line_seconds=seconds)
    for number in range(1, 11):
        terminal.progressed("trained_model", step(number) | {"steps": 12, "tokens_per_second": 1e3})
    assert said.getvalue().count("trained_model: ") == lines
