"""How is a module started on several ranks, and ended with whoever started it?

    python -m training.launch [--gpus N] [--restarts N] [--grace SECONDS]
        [--nnodes N --node-rank R --rendezvous HOST:PORT] MODULE ARGS…

This process stays between the caller and torchrun. It passes SIGTERM and SIGINT on, ends when its parent does
(even by SIGKILL), and returns the status that the ranks left (torchrun itself reports any failure as 1).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO

from storage import events, objects
from storage.contents import LOCK
from training import attempts, plan
from training.config import RunConfig, from_dict
from training.gpus import check_gpus, ranks_here
from training.processes import die_with_parent, dying_with, locked

STATUS_VARIABLE = "GPT2_STATUS_FILE"
RESTART_VARIABLE = "GPT2_RESTART"  # set where the ranks are started again after a failure
INTERRUPTED = 75  # ended by a signal, with a checkpoint: start it again to go on (EX_TEMPFAIL of sysexits.h)
GRACE_SECONDS = 120.0  # that torchrun leaves the ranks to end, at the least
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # torchrun would set it, with a warning; the ranks share the cores out themselves
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow each other down manyfold on cores that others use, too
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits from run to run
    "TORCH_NCCL_DESYNC_DEBUG": "1",  # a collective that times out names the ranks that did not come to it
    "TORCH_FR_BUFFER_SIZE": "2000",  # NCCL's flight recorder: the last collectives of each rank …
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # … which are written down then
}


def report_status(status: int) -> None:
    """Leave the exit status for the launcher; the first rank of each machine does."""
    path = os.environ.get(STATUS_VARIABLE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(str(status))


def is_restart() -> bool:
    return RESTART_VARIABLE in os.environ


def command(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    nnodes: int = 1,
    node_rank: int = 0,
    rendezvous: str = "",
) -> list[str]:
    """The torchrun command line. Several machines meet at `rendezvous`, host:port of the first of them."""
    if nnodes == 1:
        where = ["--standalone"]
    else:
        where = [f"--nnodes={nnodes}", f"--node-rank={node_rank}", "--rdzv-id=gpt2", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={rendezvous}", f"--rdzv-conf=is_host={str(node_rank == 0).lower()}"]
    program = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}"]
    return [*program, "-m", module, *arguments]


class Launch:
    """Runs torchrun, anew after a failure where that is wanted, until the ranks are done."""

    def __init__(
        self, argv: Sequence[str], restarts: int, grace: float = GRACE_SECONDS, lock: IO[str] | None = None
    ) -> None:
        self.argv, self.restarts, self.lock = argv, restarts, lock
        self.environment = {**ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{grace:.0f}", **os.environ}
        self.process: subprocess.Popen[bytes] | None = None
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass the first signal on, as the SIGTERM that torchrun hands to its ranks."""
        if self.process is not None and not self.signalled:
            self.process.send_signal(signal.SIGTERM)
        self.signalled = True

    def run(self) -> int:
        """Exit status: what the ranks reported, else torchrun's."""
        for left in reversed(range(self.restarts + 1)):
            code, reported = self.attempt()
            failed = reported is None or reported == INTERRUPTED  # a rank was killed, or a machine was lost
            if self.signalled or not failed or not left:
                break
            sys.stderr.write(f"the ranks ended with status {code}: starting them again, {left} times at most\n")
            self.environment[RESTART_VARIABLE] = "1"
        if reported is None:
            return INTERRUPTED if self.signalled and code else code
        return reported

    def attempt(self) -> tuple[int, int | None]:
        """One torchrun -> its exit status, and the status that the ranks reported if they came so far."""
        with tempfile.TemporaryDirectory() as scratch:
            status = Path(scratch, "status")
            me = os.getpid()
            # A session of its own: Ctrl-C in a terminal comes here only, and torchrun gets one signal, not two.
            self.process = subprocess.Popen(
                self.argv,
                stdin=self.lock,  # the one file that torchrun leaves open for its ranks
                env={**self.environment, STATUS_VARIABLE: str(status)},
                start_new_session=True,
                preexec_fn=dying_with(me),
            )
            if self.signalled:  # before there was anything to pass it on to
                self.process.send_signal(signal.SIGTERM)
            code = self.process.wait()
            return code, int(status.read_text()) if status.exists() else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.launch", description="Run a module under torchrun.")
    parser.add_argument("--gpus", type=int, default=0, help="ranks on this machine; 0: every GPU, or one CPU rank")
    parser.add_argument("--nnodes", type=int, default=1, help="machines")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine")
    parser.add_argument("--rendezvous", default="", help="host:port of the first machine")
    parser.add_argument("--restarts", type=int, default=0, help="starts after a failure, from the newest checkpoint")
    parser.add_argument("--grace", type=float, default=0.0, help="seconds to end in; 0: what a checkpoint takes")
    parser.add_argument("--held", action="store_true", help="standard input is the lock of the run's folder")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.nnodes > 1 and not options.rendezvous:
        parser.error(f"--nnodes {options.nnodes} needs --rendezvous HOST:PORT, the same on every machine")
    if min(options.gpus, options.restarts, options.node_rank, options.nnodes - 1) < 0:
        parser.error("--gpus, --restarts and --node-rank must be 0 or more, --nnodes 1 or more")
    die_with_parent(os.getppid())
    ranks = ranks_here(options.gpus)
    where = (options.nnodes, options.node_rank, options.rendezvous)
    try:
        check_gpus(options.gpus)
        run = run_folder(options.module, options.arguments)
        grace = options.grace or grace_seconds(options.module, options.arguments, ranks * options.nnodes)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        events.refuse(str(error))
        return 2
    program = command(options.module, options.arguments, ranks, *where)
    with ExitStack() as stack:
        lock = None
        if run and options.node_rank == 0:
            said = f"waiting until the ranks of another launch in {run} have ended"
            try:  # one launch at a time trains in a run's folder, until the last of its ranks has ended
                if not options.held:
                    lock = stack.enter_context(locked(run / LOCK, lambda: print(said, file=sys.stderr)))
            except KeyboardInterrupt:  # while it waits
                return 130
            stack.enter_context(attempts.noted(run))
        return Launch(program, options.restarts, grace, lock).run()


def run_folder(module: str, arguments: Sequence[str]) -> Path | None:
    """Of the run that is to be trained; None where the ranks do something else. Raises ValueError if it is no run's."""
    run = arguments[0] if module == "training.train" and arguments else ""
    if not run or run.startswith("-") or not objects.is_local(run):
        return None
    if not Path(run, "config.json").exists():
        raise ValueError(f"{run} holds no config.json: give a run's folder, as `gpt2 run` makes one")
    return Path(run)


def grace_seconds(module: str, arguments: Sequence[str], ranks: int) -> float:
    """How long the ranks may take to end: of a training, until its step and its checkpoint are done."""
    folder = run_folder(module, arguments)
    if folder is None:
        return GRACE_SECONDS
    run = from_dict(RunConfig, objects.read_json(str(folder / "config.json")))
    return ranks_grace(run, ranks)


def ranks_grace(run: RunConfig, ranks: int) -> float:
    return max(GRACE_SECONDS, plan.shutdown_seconds(run, ranks))


if __name__ == "__main__":
    sys.exit(main())
