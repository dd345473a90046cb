"""Kill the command at any moment: no process lives on, no run stays started, and the next run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import ROOT, TINY_SETTINGS, gpt2

from assets import trainer
from assets.failures import KILLED, STOPPED, Interrupted, ProcessFailed
from assets.resources import Launcher
from storage.objects import publish_json
from storage.places import places
from training.config import to_dict
from training.launch import grace_seconds
from training.recipes import recipe

LONG = ["run", "--name", "long", *TINY_SETTINGS, "--set", "steps=60", "--set", "checkpoint_every=5"]

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"event": "ready"}', flush=True)
time.sleep(300)
"""


def processes_of(store: Path) -> list[int]:
    """Pids of the live processes whose command line names the store."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            if any(str(store) in word for word in words):
                found.append(int(entry.name))
    return found


def is_told_to_end(pid: int) -> bool:
    """Whether SIGTERM is pending for a stopped process."""
    return bool(int(status_of(pid)["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def status_of(pid: int) -> dict[str, str]:
    """What Linux tells of a process that is there: name → value."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def wait_for(what: str, done, seconds: float = 300) -> None:  # type: ignore[no-untyped-def]
    for _ in range(int(seconds * 10)):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture
def training(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A `gpt2 run` of 60 steps, or as many as are asked for, that has saved its first checkpoint and is training on."""
    store, steps = tmp_path / "store", getattr(request, "param", 60)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands.main", *LONG, "--set", f"steps={steps}", "--store", str(store)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    checkpoint = store / "runs/long/checkpoints/step_000005/DONE"
    wait_for("the first checkpoint", lambda: checkpoint.exists() or process.poll() is not None)
    assert process.poll() is None
    yield store, process
    process.kill()


def statuses(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DAGSTER_HOME", str(places(str(store)).dagster_home))
    with dg.DagsterInstance.get() as instance:
        return [run.status.value for run in instance.get_runs()]


@pytest.mark.slow
def test_kill_9_ends_every_rank_after_a_checkpoint_and_a_run_started_at_once_goes_on_from_it(
    training: tuple[Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, process = training
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert statuses(store, monkeypatch) == ["STARTED"]  # nobody was left to say otherwise
    done = gpt2(*LONG, "--only", "data", "--only", "training", "--store", str(store), "--json", cwd=store.parent)
    assert done.returncode == 0, done.stderr
    assert statuses(store, monkeypatch) == ["SUCCESS", "FAILURE"]
    assert not processes_of(store)
    assert f"resumed from {store}/runs/long/checkpoints/step_" in (store / "runs/long/train.log").read_text()
    (lost,) = (json.loads(line) for line in (store / "runs/long/lost.jsonl").read_text().splitlines())
    assert (lost["why"], lost["steps"]) == ("restart", 0)
    steps = [line for line in (store / "runs/long/main.log").read_text().splitlines() if " trl:" in line]
    assert [int(line.split()[0][2:]) for line in steps] == list(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("training", [6000], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_ends_the_run(
    number: signal.Signals,
    training: tuple[Path, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, process = training
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and said.splitlines()[-1].startswith(b"gpt2: ") and b"goes on from there" in said
    assert not processes_of(store)
    assert "STARTED" not in statuses(store, monkeypatch)
    newest = sorted((store / "runs/long/checkpoints").glob("*/DONE"))[-1].parent
    state = json.loads((newest / "state.json").read_text())
    steps = [line for line in (store / "runs/long/main.log").read_text().splitlines() if " trl:" in line]
    assert state["step"] == int(steps[-1].split()[0][2:]) + 1  # no step was lost


@pytest.mark.slow
def test_a_run_waits_for_the_ranks_that_two_signals_have_left_behind(
    training: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    """The second Ctrl-C ends the command at once; the ranks still save, and two trainings would tear one folder."""
    store, process = training
    (rank,) = (pid for pid in processes_of(store) if b"-u" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    os.kill(rank, signal.SIGSTOP)
    wait_for("it to stop: what comes before that is taken in", lambda: status_of(rank)["State"].startswith("T"))
    process.send_signal(signal.SIGINT)
    wait_for("the first to come to the rank, for which the command waits then", lambda: is_told_to_end(rank))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert said.splitlines()[-1].startswith(b"gpt2: ") and b"Traceback" not in said
    waits = f"process {process.pid} was killed: waiting until its ranks have saved their checkpoint"
    with open(store.parent / "said", "w+") as said_now:
        again = subprocess.Popen(
            [sys.executable, "-m", "pipeline.commands.main", *LONG, "--only", "training", "--store", str(store)],
            cwd=store.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=said_now,
        )  # fmt: skip
        try:
            wait_for("it to wait", lambda: waits in (store.parent / "said").read_text() or again.poll() is not None)
            assert rank in processes_of(store) and again.poll() is None
        finally:
            os.kill(rank, signal.SIGCONT)
        assert again.wait(timeout=240) == 0
    steps = [line for line in (store / "runs/long/main.log").read_text().splitlines() if " trl:" in line]
    assert [int(line.split()[0][2:]) for line in steps] == list(range(60))


@pytest.mark.parametrize("loaded", ["typer", "duckdb", "dagster"])
def test_ctrl_c_while_the_command_is_being_loaded_is_answered_in_one_line(loaded: str, tmp_path: Path) -> None:
    (tmp_path / f"{loaded}.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.main", "run", "--store", "store"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"gpt2: {STOPPED}\n")


@pytest.mark.parametrize("name", ["demo", "gpt2-1558m"])
def test_torchrun_has_killed_ranks_that_do_not_end_before_the_command_kills_torchrun(name: str, tmp_path: Path) -> None:
    run = recipe(name)
    publish_json(str(tmp_path / "config.json"), to_dict(run))
    assert trainer._grace(run) >= grace_seconds("training.train", [str(tmp_path)], 1) + 30


def test_a_process_that_does_not_end_when_told_to_is_killed_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[subprocess.Popen[str]] = []

    def interrupt(event: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="did not end within 0 s and was killed.* goes on from there"):
        Launcher().run("stubborn", [], interrupt, started.append, grace=0.3)
    assert started[0].wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize("under", [[], ["training.launch", "--gpus", "1"]])
def test_a_process_that_the_kernel_has_killed_is_told_in_one_line(
    under: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greedy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    module, *arguments = [*under, "greedy"]
    with pytest.raises(ProcessFailed) as told:
        Launcher().run(module, arguments, lambda event: None)
    assert str(told.value) == f"a process of {module} {KILLED}"


def test_a_launch_that_ended_well_after_a_kill_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = "import os, pathlib, signal\nbegun = pathlib.Path('begun')\nif not begun.exists():\n"
    (tmp_path / "once.py").write_text(f"{once}    begun.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    Launcher().run("training.launch", ["--gpus", "1", "--restarts", "1", "once"], lambda event: None)
    assert (tmp_path / "begun").exists()


def test_the_error_of_the_rank_that_failed_is_told_though_torchrun_killed_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "both.py").write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    while not os.path.exists('ready'): time.sleep(0.05)\n"
        "    raise RuntimeError('the error of rank 0')\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
        "open('ready', 'w').close()\n"
        "while True: time.sleep(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProcessFailed, match="ended with status 1. Its last output:\n") as told:
        Launcher().run("training.launch", ["--gpus", "2", "both"], lambda event: None)
    assert "exitcode  : -9" in str(told.value)
