"""A run's checkpoints and logs on S3: another machine goes on from there as if nothing had happened."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import tiny_run
from moto.server import ThreadedMotoServer
from tiny_pipeline import free_port
from tiny_run import final_files, wait_for

from storage import objects
from storage.checkpoints import complete
from training.mirror import fetch_newest
from training.train import FAILED, Stop, Trainer, find_checkpoint

CONFIG = tiny_run.config(steps=12, checkpoint_every=3, keep_checkpoints=2)


def test_a_run_goes_on_from_the_mirror_on_another_machine(s3_store: str, tmp_path: Path) -> None:
    mirror = objects.join(s3_store, "runs/tiny")
    shards = tiny_run.tokens(tmp_path / "tokens")
    whole, here, elsewhere = (tiny_run.folder(tmp_path / n, CONFIG) for n in ("whole", "here", "elsewhere"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(here, shards, until=7, mirror=mirror)
    assert complete(mirror)[-1] == 7 and len(complete(mirror)) <= 2
    shutil.rmtree(here)

    fetch_newest(mirror, elsewhere)
    assert complete(elsewhere) == [7]
    tiny_run.steps(elsewhere, shards, mirror=mirror)
    assert final_files(elsewhere) == final_files(whole)
    assert Path(elsewhere, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert objects.read_text(f"{mirror}/main.log") == Path(whole, "main.log").read_text()
    assert complete(mirror)[-1] == 12 and len(complete(mirror)) <= 2


def test_a_torn_upload_is_passed_over_and_made_good(s3_store: str, tmp_path: Path) -> None:
    mirror = objects.join(s3_store, "runs/tiny")
    shards = tiny_run.tokens(tmp_path / "tokens")
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    tiny_run.steps(run, shards, until=7, mirror=mirror)
    objects.remove(f"{mirror}/checkpoints/step_000007/DONE")
    assert 7 not in complete(mirror)
    fetch_newest(mirror, run)
    assert complete(run) == [6, 7]  # the local one is newer, and stays
    tiny_run.steps(run, shards, until=8, mirror=mirror)
    assert complete(mirror)[-1] == 8


def at_step(step: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `do` called before a step of the trainings that follow."""
    take = Trainer.step

    def step_after(trainer: Trainer) -> None:
        if trainer.progress.step == step:
            trainer.checkpoints.wait()
            do()
        take(trainer)

    monkeypatch.setattr(Trainer, "step", step_after)


def test_a_store_that_is_away_for_a_while_costs_nothing(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.mirror.RETRY", 0.05)
    port = free_port()
    first, again = (ThreadedMotoServer(ip_address="127.0.0.1", port=port) for _ in range(2))  # to the same buckets
    first.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    at_step(5, first.stop, monkeypatch)
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    mirror = objects.join(s3_store, "runs/tiny")

    def come_back() -> None:
        wait_for(lambda: f"{mirror} can't be written now (" in caplog.text)
        again.start()

    at_step(11, come_back, monkeypatch)
    tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"), mirror=mirror)
    assert complete(run) == [9, 12] and complete(mirror)[-1] == 12
    assert objects.read_bytes(f"{mirror}/main.log") == Path(run, "main.log").read_bytes()
    again.stop()


def test_an_upload_that_lasts_holds_no_step_up_and_keeps_its_files(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, publish = threading.Event(), threading.Event(), objects.publish_file

    def publish_slowly(local: str, url: str) -> None:
        if url.endswith("/model.safetensors"):
            begun.set()
            assert goes_on.wait(60)
        publish(local, url)

    monkeypatch.setattr(objects, "publish_file", publish_slowly)
    at_step(4, lambda: begun.wait(60), monkeypatch)
    at_step(11, goes_on.set, monkeypatch)
    config = replace(CONFIG, train=replace(CONFIG.train, checkpoint_every=1, keep_every=8))
    run = tiny_run.folder(tmp_path / "run", config)
    mirror = objects.join(s3_store, "runs/tiny")
    tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"), mirror=mirror)
    assert complete(run) == [8, 11, 12]
    assert {8, 12} <= {*complete(mirror)}  # those that are kept for good are not left out


def test_the_mirror_fails_the_run_only_where_its_end_never_comes_there(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.train.LAST_UPLOAD", 0.0)
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    trainer = Trainer(CONFIG, run, tiny_run.tokens(tmp_path / "tokens"), tiny_run.alone(), Stop(), "s3://gone/run")
    assert trainer.end(trainer.loop()) == FAILED
    assert complete(run) == [9, 12]
    assert "not copied to the mirror: the same command again makes that good" in caplog.text
    tiny_run.steps(run, str(tmp_path / "tokens"), mirror=objects.join(s3_store, "runs/tiny"))
    assert complete(objects.join(s3_store, "runs/tiny")) == [12]


def test_a_damaged_checkpoint_is_fetched_again_from_the_mirror_or_the_one_before_that(
    s3_store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = objects.join(s3_store, "runs/tiny")
    shards = tiny_run.tokens(tmp_path / "tokens")
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    for until in (3, 5):
        tiny_run.steps(run, shards, until=until, mirror=mirror)
    assert complete(mirror) == [3, 5]
    good = Path(run, "checkpoints/step_000005/model.safetensors").read_bytes()
    Path(run, "checkpoints/step_000005/model.safetensors").write_bytes(good[:-1])
    find_checkpoint(run, mirror)
    assert complete(run) == [3, 5]
    assert Path(run, "checkpoints/step_000005/model.safetensors").read_bytes() == good

    objects.publish_bytes(f"{mirror}/checkpoints/step_000005/model.safetensors", good[:-1])
    shutil.rmtree(Path(run, "checkpoints"))
    find_checkpoint(run, mirror)
    assert complete(run) == [3] and "passed over step_000005 of s3://" in caplog.text


@pytest.mark.slow
def test_the_whole_program_with_a_mirror(s3_store: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    mirror = objects.join(s3_store, "runs/tiny")
    done = tiny_run.train(run, tiny_run.tokens(tmp_path / "tokens"), 1, f"--mirror={mirror}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert complete(mirror)[-1] == 12
    assert objects.read_text(f"{mirror}/samples.txt") == Path(run, "samples.txt").read_text()
    assert os.path.getsize(f"{run}/main.log") == objects.stat(f"{mirror}/main.log").bytes
