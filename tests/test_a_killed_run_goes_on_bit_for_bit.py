"""N steps equal k steps, an end of any kind, and N - k steps: the same main.log and the same weights."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
from tiny_run import children, wait_for

from storage.checkpoints import complete
from training.processes import started

pytestmark = pytest.mark.slow

# Four micro-steps a step on one rank, two on two; updates rounded at random; updates left out as outliers, once the
# window of 128 is full; shards of 24 sequences, of which a step takes 8: most ends lie within one.
STEPS = 190
PLAIN = tiny_run.config(
    steps=STEPS, val_every=40, checkpoint_every=7, warmup_steps=5, keep_checkpoints=3, lr=1e-3, dtype="bf16",
    master_weights=False, skip_loss_z=1.5, skip_grad_z=1.5,
)  # fmt: skip
CONFIG = replace(PLAIN, machine=replace(PLAIN.machine, micro_batch=2))


def start_and_end(run: str, shards: str, ranks: int, end: Callable[[subprocess.Popen[str]], None]) -> int:
    """Start a run, call `end` when it is amid its steps -> exit status."""
    step, steps = random.randrange(9, STEPS - 40), tiny_run.Steps()
    print(f"ended at step {step}")
    with steps.start(tiny_run.command(run, shards, ranks)) as process:
        try:
            steps.wait(run, step)
            end(process)
            steps.let_go()
            _, errors = process.communicate(timeout=240)
        finally:
            process.kill()
        assert f"s:{STEPS - 1} trl" not in Path(run, "main.log").read_text(), errors[-2000:]
        return process.returncode


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, str]:
    """(ranks, shards, run folder)"""
    place = tmp_path_factory.mktemp("uninterrupted")
    shards = tiny_run.tokens(place / "tokens")
    run = tiny_run.folder(place / "run", CONFIG)
    done = tiny_run.train(run, shards, request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, shards, run


def check_equal(run: str, shards: str, ranks: int, whole: str) -> None:
    done = tiny_run.train(run, shards, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in Path(run, "train.log").read_text()
    assert Path(run, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(whole)
    assert Path(run, "samples.txt").read_text() == Path(whole, "samples.txt").read_text()


def test_sigterm_saves_a_checkpoint_and_ends_with_75(uninterrupted: tuple[int, str, str], tmp_path: Path) -> None:
    ranks, shards, whole = uninterrupted
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    assert start_and_end(run, shards, ranks, lambda process: process.terminate()) == 75
    assert complete(run)[-1] >= 10  # the step that it was in, not the last multiple of 7
    check_equal(run, shards, ranks, whole)


def test_sigkill_of_the_ranks_loses_only_the_steps_since_the_checkpoint(
    uninterrupted: tuple[int, str, str], tmp_path: Path
) -> None:
    ranks, shards, whole = uninterrupted
    run = tiny_run.folder(tmp_path / "run", CONFIG)

    def kill(process: subprocess.Popen[str]) -> None:
        (agent,) = children(process.pid)
        os.kill(agent, signal.SIGSTOP)  # or else it may end the others, once it sees that one has gone
        try:
            for rank in children(agent):
                os.kill(rank, signal.SIGKILL)
        finally:
            os.kill(agent, signal.SIGCONT)

    assert start_and_end(run, shards, ranks, kill) not in (0, 75)
    check_equal(run, shards, ranks, whole)


def test_all_ranks_end_with_their_parent(uninterrupted: tuple[int, str, str], tmp_path: Path) -> None:
    ranks, shards, whole = uninterrupted
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    left: list[int] = []

    def kill(process: subprocess.Popen[str]) -> None:
        (agent,) = children(process.pid)
        left.extend([agent, *children(agent)])
        process.kill()

    start_and_end(run, shards, ranks, kill)
    wait_for(lambda: all(started(pid) == "gone" for pid in left))
    assert complete(run)[-1] >= 10  # the ranks saved where they were
    check_equal(run, shards, ranks, whole)
