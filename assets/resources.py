"""What do the assets work with? The launcher of processes, the listener to progress, and the run's partitions."""

import collections
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import dagster as dg

from assets.failures import KEPT, KILLED, Interrupted, ProcessFailed, Refused
from storage import events
from training.launch import INTERRUPTED
from training.processes import dying_with

RUNS = dg.DynamicPartitionsDefinition(name="run")

POOL = "gpu"  # Dagster's pool of this machine's cards: what uses them takes its one slot in turn
STOP_SECONDS = 120.0  # that a process gets to end before it is killed
# waiting threads sleep: spinning ones made sampling thirty times slower on two cores that others used, too
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
TAIL_LINES = 40  # of a failed process's output that its error quotes
RANK_ENDED = re.compile(r"\s*exitcode\s*: ")  # as torchrun lists the ranks that failed

Event = dict[str, Any]


class Listener(Protocol):
    """Whoever wants to show how far a stage is."""

    def started(self, asset: str) -> None: ...

    def progressed(self, asset: str, event: Event) -> None: ...

    def finished(self, asset: str, made: Any) -> None: ...


class Silent:
    """The listener of a run that nobody watches on a terminal."""

    def started(self, asset: str) -> None: ...

    def progressed(self, asset: str, event: Event) -> None: ...

    def finished(self, asset: str, made: Any) -> None: ...


@dataclass(frozen=True)
class NewRun:
    """What a run is that a job is launched for, as its config.json will hold it; None: it is there already."""

    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Launcher:
    """Runs this project's torch programs as processes that end when this one does."""

    python: str = sys.executable

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        on_event: Callable[[Event], None],
        on_start: Callable[[subprocess.Popen[str]], None] = lambda process: None,
        grace: float = STOP_SECONDS,
        held: IO[str] | None = None,
    ) -> None:
        """Run `python -m module arguments` until it ends; `grace`: seconds that it gets to end when told to.

        `held`: an open file whose lock lasts as long as the process or any that it starts, should this one die before
        them. It is their standard input, the one file that torchrun leaves open for its ranks.

        Events go to `on_event`, all other output to stdout, where Dagster's compute logs keep it.
        Raises ProcessFailed, or Interrupted for a trainer that stopped at a checkpoint.
        """
        me = os.getpid()
        process = subprocess.Popen(
            [self.python, "-m", module, *arguments],
            stdin=held,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | QUIET_THREADS | {events.EVENTS_VARIABLE: "1"},
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which then stops that one
            preexec_fn=dying_with(me),
        )
        on_start(process)
        tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        try:
            self._listen(process, on_event, tail)
        except BaseException:
            stop(process, grace)
            raise
        _check_status(process.wait(), module, tail)

    def _listen(
        self, process: subprocess.Popen[str], on_event: Callable[[Event], None], tail: collections.deque[str]
    ) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            event = events.parse(line)
            if event is not None and event["event"] == "refused":
                raise Refused(event["message"])
            if event is not None:
                on_event(event)
            else:
                sys.stdout.write(line)
                tail.append(line)


def stop(process: subprocess.Popen[str], grace: float = STOP_SECONDS) -> None:
    """Ask the process to save and end; kill its whole session when it has not within the grace time, or at the next
    Ctrl-C. Raises Interrupted where the time was too short."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        raise Interrupted(f"the process did not end within {grace:.0f} s and was killed; {KEPT}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _check_status(status: int, module: str, tail: collections.deque[str]) -> None:
    if status == INTERRUPTED:
        raise Interrupted(f"{module} was told to stop; the same command goes on from its newest checkpoint")
    ranks = [line for line in tail if RANK_ENDED.match(line)]  # the last is the first that failed
    if status == -signal.SIGKILL or (status and ranks and f": -{signal.SIGKILL} " in ranks[-1]):
        raise ProcessFailed(f"a process of {module} {KILLED}")
    if status:
        raise ProcessFailed(f"{module} ended with status {status}. Its last output:\n{''.join(tail)}")
