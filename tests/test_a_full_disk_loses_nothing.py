"""A disk that fills while a run trains: that is told at once, training goes on, and what was kept back is written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run

from storage.checkpoints import complete
from training.metrics import Lines
from training.train import FAILED, Stop, Trainer

CONFIG = tiny_run.config(steps=9, checkpoint_every=2, keep_checkpoints=9)
SMALL = 20_000  # bytes: less than the weights, more than the logs


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return tiny_run.tokens(tmp_path / "tokens")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_save_tries_again(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, run = (tiny_run.folder(tmp_path / name, CONFIG) for name in ("whole", "run"))
    tiny_run.steps(whole, shards)
    save = Trainer.save

    def save_on_a_full_disk(trainer: Trainer) -> None:
        with no_file_larger_than(SMALL if trainer.progress.step in (4, 6) else resource.RLIM_INFINITY):
            save(trainer)
            trainer.checkpoints.wait()

    monkeypatch.setattr(Trainer, "save", save_on_a_full_disk)
    tiny_run.steps(run, shards)
    assert complete(run) == [2, 8, 9] and not list(Path(run, "checkpoints").glob(".step_*"))
    assert "step 4 could not be saved (" in caplog.text and "File too large" in caplog.text
    assert Path(run, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(whole)


@pytest.mark.parametrize(("tries", "status"), [(5, 0), (2, FAILED)])
def test_the_last_checkpoint_is_tried_again_until_it_is_there_or_the_run_has_failed(
    tries: int,
    status: int,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("training.train.RETRY", 0.01)
    monkeypatch.setattr("training.train.LAST_TRIES", tries)
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    trainer = Trainer(CONFIG, run, shards, tiny_run.alone(), Stop())
    save, saves = trainer.save, 0

    def save_on_a_full_disk() -> None:
        nonlocal saves
        saves += trainer.progress.step == CONFIG.train.steps
        with no_file_larger_than(SMALL if 0 < saves < 4 else resource.RLIM_INFINITY):
            save()
            trainer.checkpoints.wait()

    monkeypatch.setattr(trainer, "save", save_on_a_full_disk)
    assert trainer.end(trainer.loop()) == status
    assert complete(run)[-1] == (9 if status == 0 else 8)
    assert ("the last checkpoint is not saved" in caplog.text) == (status != 0)


def test_lines_that_the_disk_does_not_take_are_written_once_it_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Lines(str(tmp_path / "main.log"))
    lines.add("first")
    disk = lines.file
    with open("/dev/full", "ab", buffering=0) as full:
        lines.file = full
        for word in ("second", "third"):
            lines.add(word)
        with pytest.raises(OSError, match="No space left"):  # no checkpoint is saved without them
            lines.sync()
    lines.file = disk
    lines.add("fourth")
    assert (tmp_path / "main.log").read_text() == "first\nsecond\nthird\nfourth\n"
    assert caplog.text.count("its lines are kept in memory, training goes on") == 1
