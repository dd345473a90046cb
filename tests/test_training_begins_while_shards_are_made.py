"""Training begins with the first shard, waits for later ones, and ends as if all had been there from the start."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import tiny_run
from local_hub import LocalHub
from test_hub_files_come_whole import parquet, shard
from tiny_pipeline import ROOT, TINY_SETTINGS, copied, gpt2

from assets.making import Maker, Output
from assets.observer import Observer
from assets.resources import Launcher, Silent
from assets.trainer import Training
from storage import objects, records, shards
from storage.checkpoints import complete
from storage.places import Places, places
from storage.shards import COMPLETE, PLAN

pytestmark = pytest.mark.slow


def waiting(run: str) -> bool:
    log = Path(run, "train.log")
    return log.exists() and "waiting for training shard 2" in log.read_text()


def test_batches_are_the_same_on_two_ranks_that_had_to_wait(tmp_path: Path) -> None:
    config = tiny_run.config(steps=6, checkpoint_every=100)
    whole = tiny_run.tokens(tmp_path / "whole")
    at_once = tiny_run.folder(tmp_path / "at-once", config)
    assert tiny_run.train(at_once, whole, 2).returncode == 0
    growing = Path(tiny_run.tokens(tmp_path / "growing"))
    late = growing / "walk_train_000002.bin"
    late.rename(tmp_path / late.name)
    (growing / PLAN).write_text("{}")
    run = tiny_run.folder(tmp_path / "run", config)
    started = tiny_run.command(run, str(growing), 2)
    with subprocess.Popen(started, cwd=ROOT, env=tiny_run.environment(), stderr=subprocess.DEVNULL) as process:
        tiny_run.wait_for(lambda: process.poll() is not None or waiting(run))
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 75 and complete(run) == [3]
    with subprocess.Popen(started, cwd=ROOT, env=tiny_run.environment(), stderr=subprocess.DEVNULL) as process:
        tiny_run.wait_for(lambda: process.poll() is not None or "resumed" in Path(run, "train.log").read_text())
        (tmp_path / late.name).rename(late)
        (growing / COMPLETE).write_text("{}")
        assert process.wait(240) == 0
    assert Path(run, "main.log").read_text() == Path(at_once, "main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(at_once)


def token_shards() -> tuple[str, dict[str, bytes]]:
    """Three that somebody else has tokenized."""
    words = np.random.default_rng(0).integers(0, 50256, size=(3, 1800))
    names = ["edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin", "edu_fineweb_train_000002.bin"]
    return (
        "karpathy/fineweb-edu-100B-gpt2-token-shards",
        {n: shard([50256, *w.tolist()]) for n, w in zip(names, words, strict=True)},
    )


def documents() -> tuple[str, dict[str, bytes]]:
    """Three files of parquet, of which the first two give the validation shard and one for training."""
    sizes = {"000": 50, "001": 10, "002": 200}
    texts = {name: [f"file {name} document {d} " * 20 for d in range(size)] for name, size in sizes.items()}
    return "HuggingFaceFW/fineweb-edu", {f"sample/10BT/{n}_00000.parquet": parquet(t) for n, t in texts.items()}


KINDS = {"fineweb-edu-100B-tokens": token_shards, "fineweb-edu-10B": documents}


ONLY = [word for stage in ("documents", "token_shards", "trained_model") for word in ("--only", stage)]


@dataclass
class SlowHub:
    """A hub that keeps the last file of a corpus until it is let go."""

    server: LocalHub
    corpus: str
    last: threading.Event

    def run(self, name: str = "early") -> list[str]:
        """A command that makes documents, tokens and a model."""
        return ["run", "--name", name, "--corpus", self.corpus, *TINY_SETTINGS, *ONLY]


@pytest.fixture(params=KINDS)
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowHub]:
    repo, files = KINDS[request.param]()
    last = threading.Event()
    with LocalHub(held={list(files)[-1]: last}) as server:
        server.publish(repo, "1", files)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield SlowHub(server, request.param, last)
        last.set()


def begin(hub: SlowHub, store: Path) -> subprocess.Popen[str]:
    """The command, once the run that it trains waits for what the hub keeps."""
    command = [sys.executable, "-m", "pipeline.commands.main", *hub.run(), "--store", str(store)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=store.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)  # type: ignore[call-overload]
    tiny_run.wait_for(lambda: process.poll() is not None or waiting(f"{store}/runs/early"))
    assert process.poll() is None
    return process  # type: ignore[no-any-return]


def observed(store: Path) -> list[str | None]:
    """The partitions of the trainings that Dagster's page shows."""
    with dg.DagsterInstance.from_config(str(places(str(store)).dagster_home)) as dagster:
        found = dagster.fetch_observations(dg.AssetKey("trained_model"), limit=9).records
    return [record.asset_observation.partition for record in found if record.asset_observation]


def recorded(store: Path, place: str) -> list[records.Record]:
    found = store.glob(f"{place}/record.json")
    return [r for path in found if (r := records.read_record(str(store), str(path.parent.relative_to(store))))]


def test_a_run_steps_before_the_last_file_has_come_and_its_record_stands_on_all(hub: SlowHub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = begin(hub, store)
    assert " trl:" in (store / "runs/early/main.log").read_text() and not recorded(store, "tokens/*")
    tiny_run.wait_for(lambda: process.poll() is not None or observed(store) == ["early"])  # live in the page
    hub.last.set()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert observed(store) == ["early"]  # once in five minutes
    (documents,), (tokens,), (model,) = (recorded(store, p) for p in ("corpora/*/documents", "tokens/*", "runs/early"))
    assert [p.fingerprint for p in model.parents] == [tokens.fingerprint]
    assert [p.fingerprint for p in tokens.parents] == [documents.fingerprint]
    assert documents.ended <= tokens.ended <= model.ended
    other = copied(str(store), tmp_path / "other", "runs")  # all shards are there
    done = gpt2(*hub.run("late"), "--store", other, cwd=tmp_path)
    assert done.returncode == 0 and "waiting" not in Path(other, "runs/late/train.log").read_text(), done.stderr
    for name in ("main.log", "checkpoints/step_000006/model.safetensors"):
        assert (store / "runs/early" / name).read_bytes() == Path(other, "runs/late", name).read_bytes()


def test_a_file_that_fails_stops_the_training_at_a_checkpoint_and_says_why(hub: SlowHub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = begin(hub, store)
    hub.server.wrong_bytes = 99
    hub.last.set()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2 and "twice came with sha256" in said
    assert complete(str(store / "runs/early"))[-1] == 3 and not recorded(store, "tokens/*")
    hub.server.wrong_bytes = 0
    folder = next((store / "tokens").iterdir())
    assert len(shards.shard_paths(str(folder), "train")) == 1
    done = gpt2(*hub.run(), "--store", str(store), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [line for line in (store / "runs/early/main.log").read_text().splitlines() if " trl:" in line]
    assert len(steps) == 6 and recorded(store, "tokens/*")


def test_a_shard_that_fails_its_check_is_named_and_left_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, files = token_shards()
    last = list(files)[-1]
    store = tmp_path / "store"
    with LocalHub() as server:
        server.publish(repo, "1", files | {last: shard([50256, 65535])})
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        asked = ["run", "--corpus", "fineweb-edu-100B-tokens", *TINY_SETTINGS, *ONLY[:4], "--store", str(store)]
        done = gpt2(*asked, "--json", cwd=tmp_path)
    assert done.returncode == 1 and not recorded(store, "tokens/*")
    (said,) = done.stderr.splitlines()
    assert said.startswith("gpt2: token_shards: shards_are_whole failed: problem ")
    assert f"{last} holds token 65535" in said and "remove it and make it anew" in said


def test_what_fails_in_copying_from_s3_stops_the_training_at_a_checkpoint(s3_store: str, tmp_path: Path) -> None:
    maker = Maker(Places(s3_store, tmp_path / "home"), Launcher(), Silent())
    tokens, out = Output("token_shards", "tokens/walk", "1", {}), f"{s3_store}/tokens/walk"
    for path in Path(tiny_run.tokens(tmp_path / "walk", shards=2)).iterdir():
        objects.publish_file(str(path), f"{out}/{path.name}")
    objects.publish_json(f"{out}/{PLAN}", {})
    context, config = dg.build_asset_context(partition_key="r"), tiny_run.config(checkpoint_every=100)
    training = Training(maker, "r", config, tokens, Observer(context, maker, config))
    folder = maker.folder("runs/r")
    tiny_run.wait_for(lambda: not training.thread.is_alive() or waiting(folder))
    objects.publish_bytes(f"{out}/walk_train_copy.bin", b"")
    limit = threading.Timer(300, training.stop)
    limit.start()
    with pytest.raises(ValueError, match="'copy'"):
        training.join(context, lambda event: None)
    limit.cancel()
    assert complete(folder) == [3]
