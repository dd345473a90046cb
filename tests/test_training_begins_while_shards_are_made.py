"""Training begins with the first shard, waits for later ones, and ends as if all had been there from the start."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from local_hub import LocalHub
from test_hub_files_come_whole import shard
from tiny_pipeline import ROOT, TINY_SETTINGS, gpt2

from storage import records, shards
from training.checkpoint import complete
from training.tokenization import COMPLETE, PLAN

pytestmark = pytest.mark.slow

REPO = "karpathy/fineweb-edu-100B-gpt2-token-shards"
LATE = "edu_fineweb_train_000002.bin"


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
        assert process.wait(60) == 75 and complete(run) == [3]
    with subprocess.Popen(started, cwd=ROOT, env=tiny_run.environment(), stderr=subprocess.DEVNULL) as process:
        tiny_run.wait_for(lambda: process.poll() is not None or "resumed" in Path(run, "train.log").read_text())
        (tmp_path / late.name).rename(late)
        (growing / COMPLETE).write_text("{}")
        assert process.wait(60) == 0
    assert Path(run, "main.log").read_text() == Path(at_once, "main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(at_once)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Three shards that somebody else has tokenized, the last of which comes when it is let go."""
    words = np.random.default_rng(0).integers(0, 50256, size=(3, 1800))
    names = ["edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin", LATE]
    with LocalHub(held={LATE: threading.Event()}) as server:
        server.publish(REPO, "1", {n: shard([50256, *w.tolist()]) for n, w in zip(names, words, strict=True)})
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
        server.held[LATE].set()


RUN = ["run", "--name", "early", "--corpus", "fineweb-edu-100B-tokens", *TINY_SETTINGS]
TOKENS, MODEL = ["--only", "documents", "--only", "token_shards"], ["--only", "trained_model"]


def begin(store: Path) -> subprocess.Popen[str]:
    """The command, once the run that it trains waits for the shard that is held."""
    command = [sys.executable, "-m", "pipeline.commands.main", *RUN, *TOKENS, *MODEL, "--store", str(store)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=store.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)  # type: ignore[call-overload]
    tiny_run.wait_for(lambda: process.poll() is not None or waiting(f"{store}/runs/early"))
    assert process.poll() is None
    return process  # type: ignore[no-any-return]


def tokens_record(store: Path) -> records.Record | None:
    key = json.loads((store / "runs/early/inputs.json").read_text())["documents"].split("/")[1]
    return records.read_record(str(store), f"tokens/{key}")


def test_a_run_steps_before_the_last_shard_has_come_and_its_record_stands_on_all(hub: LocalHub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = begin(store)
    assert " trl:" in (store / "runs/early/main.log").read_text() and tokens_record(store) is None
    hub.held[LATE].set()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    tokens, model = tokens_record(store), records.read_record(str(store), "runs/early")
    assert tokens is not None and model is not None and tokens.tokens == 3 * 1801
    assert [p.fingerprint for p in model.parents] == [tokens.fingerprint]
    assert tokens.ended <= model.ended
    other = tmp_path / "other"
    for part in (TOKENS, MODEL):
        done = gpt2(*RUN, *part, "--store", str(other), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("main.log", "checkpoints/step_000006/model.safetensors"):
        assert (store / "runs/early" / name).read_bytes() == (other / "runs/early" / name).read_bytes()


def test_shards_that_fail_stop_the_training_at_a_checkpoint_and_say_why(hub: LocalHub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = begin(store)
    hub.wrong_bytes = 2
    hub.held[LATE].set()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "twice came with sha256" in said
    assert complete(str(store / "runs/early"))[-1] == 3 and tokens_record(store) is None
    folder = next((store / "tokens").iterdir())
    assert len(shards.shard_paths(str(folder), "train")) == 1
    done = gpt2(*RUN, *TOKENS, *MODEL, "--store", str(store), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [line for line in (store / "runs/early/main.log").read_text().splitlines() if " trl:" in line]
    assert len(steps) == 6 and tokens_record(store) is not None
