"""A run's checkpoints and logs on S3: another machine goes on from there as if nothing had happened."""

import os
import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import final_files

from storage import objects
from training.checkpoint import complete, fetch_newest

CONFIG = tiny_run.config(steps=12, checkpoint_every=3, keep_checkpoints=2)


def test_a_run_goes_on_from_the_mirror_on_another_machine(s3_store: str, tmp_path: Path) -> None:
    mirror = objects.join(s3_store, "runs/tiny")
    shards = tiny_run.tokens(tmp_path / "tokens")
    whole, here, elsewhere = (tiny_run.folder(tmp_path / n, CONFIG) for n in ("whole", "here", "elsewhere"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(here, shards, until=7, mirror=mirror)
    assert complete(mirror) == [6, 7]  # 3 is dropped there, too
    shutil.rmtree(here)

    fetch_newest(mirror, elsewhere)
    assert complete(elsewhere) == [7]
    trainer = tiny_run.steps(elsewhere, shards, mirror=mirror)
    trainer.checkpoints.upload()
    assert final_files(elsewhere) == final_files(whole)
    assert Path(elsewhere, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert objects.read_text(f"{mirror}/main.log") == Path(whole, "main.log").read_text()
    assert complete(mirror) == [9, 12]


def test_a_torn_upload_is_passed_over_and_made_good(s3_store: str, tmp_path: Path) -> None:
    mirror = objects.join(s3_store, "runs/tiny")
    shards = tiny_run.tokens(tmp_path / "tokens")
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    tiny_run.steps(run, shards, until=7, mirror=mirror)
    objects.remove(f"{mirror}/checkpoints/step_000007/DONE")
    assert complete(mirror) == [6]
    fetch_newest(mirror, run)
    assert complete(run) == [6, 7]  # the local one is newer, and stays
    tiny_run.steps(run, shards, until=8, mirror=mirror)
    assert complete(mirror) == [7, 8]


@pytest.mark.slow
def test_the_whole_program_with_a_mirror(s3_store: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    mirror = objects.join(s3_store, "runs/tiny")
    done = tiny_run.train(run, tiny_run.tokens(tmp_path / "tokens"), 1, f"--mirror={mirror}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert complete(mirror) == [9, 12]
    assert objects.read_text(f"{mirror}/samples.txt") == Path(run, "samples.txt").read_text()
    assert os.path.getsize(f"{run}/main.log") == objects.stat(f"{mirror}/main.log").bytes
