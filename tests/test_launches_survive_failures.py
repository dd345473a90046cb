"""Restarts after a killed rank, and two machines as one: the same main.log as one undisturbed process."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
from tiny_pipeline import free_port
from tiny_run import Steps, children, wait_for

from training.launch import INTERRUPTED, Launch, command, grace_seconds
from training.recipes import recipe

pytestmark = pytest.mark.slow

CONFIG = tiny_run.config(steps=60, val_every=20, checkpoint_every=7)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on two ranks."""
    run = tiny_run.folder(tmp_path_factory.mktemp("runs") / "undisturbed", CONFIG)
    done = tiny_run.train(run, shards, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def launch(run: str, shards: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "training.launch", *options, "training.train", run, f"--tokens={shards}"]


def start(program: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(program, cwd=tiny_run.ROOT, env=tiny_run.environment(), text=True, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]


def test_the_launcher_restarts_all_ranks_when_one_is_killed(shards: str, undisturbed: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    steps = Steps()
    process = steps.start(launch(run, shards, "--gpus=2", "--restarts=1"))
    steps.wait(run)
    (agent,) = children(process.pid)
    assert b"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    os.kill(children(agent)[0], signal.SIGKILL)
    steps.let_go()
    end(process)
    assert "resumed from" in Path(run, "train.log").read_text()
    assert Path(run, "main.log").read_text() == Path(undisturbed, "main.log").read_text()


def test_a_launch_waits_for_the_ranks_of_a_killed_one(shards: str, undisturbed: str, tmp_path: Path) -> None:
    """They still save a checkpoint, and two trainings in one folder would tear each other's files."""
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    steps = Steps()
    killed = steps.start(launch(run, shards, "--gpus=2"))
    steps.wait(run)
    (agent,) = children(killed.pid)
    ranks = children(agent)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    killed.kill()
    killed.wait()
    steps.let_go()
    again = start(launch(run, shards, "--gpus=2"))
    try:
        assert again.stderr and "waiting until the ranks of another launch" in again.stderr.readline()
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
    end(again)
    assert read(run, "main.log") == read(undisturbed, "main.log")


def test_two_machines_train_as_one_and_come_back_when_one_of_them_is_lost(
    shards: str, undisturbed: str, tmp_path: Path
) -> None:
    run = tiny_run.folder(tmp_path / "run", CONFIG)
    both = ("--gpus=1", "--nnodes=2", "--restarts=3", f"--rendezvous=127.0.0.1:{free_port()}")
    steps = Steps()
    first, second = (steps.start(launch(run, shards, *both, f"--node-rank={number}")) for number in (0, 1))
    steps.wait(run)
    second.kill()  # with its launcher, torchrun and its rank end; the first machine waits for another
    second.wait()
    steps.let_go()
    second = start(launch(run, shards, *both, "--node-rank=1"))
    end(first)
    end(second)
    assert "resumed from" in Path(run, "train.log").read_text()
    # Not to the bit: alone on its "machine", a rank computes with more threads than beside another.
    assert tiny_run.losses(run) == pytest.approx(tiny_run.losses(undisturbed), abs=1e-5)
    assert len(tiny_run.losses(run)) == 60


def test_four_ranks_on_two_machines_shard_within_each_and_replicate_across(shards: str, tmp_path: Path) -> None:
    """Hybrid groups: `shard_ranks` as many as a machine has. The same losses as one rank alone."""
    config = replace(CONFIG, machine=replace(CONFIG.machine, shard_ranks=2), train=replace(CONFIG.train, steps=20))
    run, alone = (tiny_run.folder(tmp_path / name, config) for name in ("run", "alone"))
    both = ("--gpus=2", "--nnodes=2", f"--rendezvous=127.0.0.1:{free_port()}")
    machines = [start(launch(run, shards, *both, f"--node-rank={number}")) for number in (0, 1)]
    for machine in machines:
        end(machine)
    tiny_run.steps(alone, shards, shard_ranks=0)
    assert tiny_run.losses(run) == pytest.approx(tiny_run.losses(alone), abs=1e-5)
    assert len(list(Path(run, "checkpoints/step_000020").glob("optimizer_*_of_00002.safetensors"))) == 2


def test_a_rank_that_hangs_is_named_and_all_start_again(
    shards: str, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    # no rank of a slow machine is 20 s behind the other
    run = tiny_run.folder(tmp_path / "run", replace(CONFIG, machine=replace(CONFIG.machine, timeout=20.0)))
    steps = Steps()
    process = steps.start(launch(run, shards, "--gpus=2", "--restarts=1"))
    steps.wait(run)
    (agent,) = children(process.pid)
    os.kill(rank_one(children(agent)), signal.SIGSTOP)
    steps.let_go()
    end(process)
    where = r"rank 0 failed at step \d+\. rank 0: step \d+, after its backward pass; rank 1: step \d+, "
    events = read(run, "train.log")
    assert re.search(where, events) and "the others wait for rank 1" in events
    # Said before the time limit, which on a GPU aborts the process.
    assert re.search(r"rank 0 has not come further for \d+ s\. rank 0: step .*; the others wait for rank 1", events)
    assert read(run, "main.log") == read(undisturbed, "main.log")


def rank_one(pids: list[int]) -> int:
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    return next(pid for pid, variables in environments.items() if b"RANK=1" in variables)


def read(run: str, name: str) -> str:
    return Path(run, name).read_text()


def test_bad_input_ends_with_status_2_and_one_line(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(batch_tokens=3 * 16))
    done = tiny_run.train(run, shards, 2)
    assert done.returncode == 2
    assert "batch_tokens=48 does not divide into 2 ranks: the nearest that do are 32 and 64" in done.stderr


def test_a_folder_that_is_no_runs_is_refused_before_torchrun_starts(tmp_path: Path) -> None:
    nowhere = tiny_run.train(str(tmp_path), "tokens")
    said = f"{tmp_path} holds no config.json: give a run's folder, as `gpt2 run` makes one\n"
    assert (nowhere.returncode, nowhere.stderr) == (2, said)


def test_torchrun_leaves_the_ranks_the_time_that_a_step_and_a_checkpoint_take(tmp_path: Path) -> None:
    small = tiny_run.folder(tmp_path / "small", CONFIG)
    large = tiny_run.folder(tmp_path / "large", recipe("gpt2-1558m"))
    assert grace_seconds("training.train", [small], 8) == grace_seconds("training.bench", ["d12"], 8) == 120
    two_checkpoints = 2 * 14 * 1.56e9 / 300e6
    assert two_checkpoints < grace_seconds("training.train", [large], 8) < two_checkpoints + 60


def test_a_signal_that_comes_before_torchrun_is_started_is_passed_on_to_it() -> None:
    launch = Launch([sys.executable, "-c", "import time; time.sleep(30)"], restarts=1)
    signal.raise_signal(signal.SIGTERM)
    assert launch.run() == INTERRUPTED
    assert launch.process and launch.process.returncode == -signal.SIGTERM


def test_a_rank_that_waits_for_another_to_come_ends_when_told_to(shards: str, tmp_path: Path) -> None:
    """The other may have been ended by the same signal before it could answer to it."""
    run, port = tiny_run.folder(tmp_path / "run", CONFIG), free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    program = [sys.executable, "-m", "training.train", run, f"--tokens={shards}"]
    rank = subprocess.Popen(program, cwd=tiny_run.ROOT, env=tiny_run.environment() | place)
    kinds = [kind for kind in ("tcp", "tcp6") if Path("/proc/net", kind).exists()]
    listening = re.compile(rf":{port:04X} 0+:0000 0A")  # a socket in its state
    wait_for(lambda: any(listening.search(Path("/proc/net", kind).read_text()) for kind in kinds))
    rank.terminate()
    try:
        assert rank.wait(timeout=30) == -signal.SIGTERM
    finally:
        rank.kill()


def test_several_machines_meet_at_a_place() -> None:
    line = command("training.train", ["run"], 8, nnodes=2, node_rank=1, rendezvous="host:29400")
    assert "--rdzv-endpoint=host:29400" in line and "--standalone" not in line


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--nnodes=2", "--nnodes 2 needs --rendezvous"),
        ("--nnodes=0", "--nnodes 1 or more"),
        ("--gpus=-1", "must be 0 or more"),
        ("--restarts=-1", "must be 0 or more"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(option: str, said: str) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "training.launch", option, "training.train"],
        cwd=tiny_run.ROOT, env=tiny_run.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 2 and said in refused.stderr
