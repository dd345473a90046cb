"""How is a module started on several ranks, and ended with whoever started it?

    python -m training.launch [--gpus N] [--restarts N] [--nnodes N --node-rank R --rendezvous HOST:PORT]
        MODULE ARGS…

This process stays between the caller and torchrun. It passes SIGTERM and SIGINT on, ends when its parent does
(even by SIGKILL), and returns the status that the ranks left (torchrun itself reports any failure as 1).
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STATUS_VARIABLE = "GPT2_STATUS_FILE"
INTERRUPTED = 75  # ended by a signal, with a checkpoint: start it again to go on (EX_TEMPFAIL of sysexits.h)
GRACE_SECONDS = 120  # that torchrun leaves the ranks for their last checkpoint
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends; `parent` is the pid to expect."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it had ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


def report_status(status: int) -> None:
    """Leave the exit status for the launcher; the first rank of each machine does."""
    path = os.environ.get(STATUS_VARIABLE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(str(status))


def gpu_count() -> int:
    """GPUs of this machine, asked of its driver; 0 without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def ranks_here(gpus: int) -> int:
    """Ranks on this machine for a configured number of GPUs: 0 is every GPU, or one CPU rank."""
    return gpus or gpu_count() or 1


def command(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    nnodes: int = 1,
    node_rank: int = 0,
    rendezvous: str = "",
    restarts: int = 0,
) -> list[str]:
    """The torchrun command line. Several machines meet at `rendezvous`, the host:port of one of them."""
    if nnodes == 1:
        where = ["--standalone"]
    else:
        where = [f"--nnodes={nnodes}", f"--node-rank={node_rank}", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={rendezvous}", "--rdzv-id=gpt2"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}"),
        *(f"--max-restarts={restarts}", "-m", module, *arguments),
    ]


def run(argv: Sequence[str]) -> int:
    """Run torchrun until it ends -> the ranks' exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        status = Path(scratch, "status")
        environment = {"OMP_NUM_THREADS": "1", **os.environ, STATUS_VARIABLE: str(status)}
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
        me = os.getpid()
        signalled: list[int] = []
        # A session of its own: Ctrl-C in a terminal comes here only, and torchrun gets one signal, not two.
        process = subprocess.Popen(
            argv, env=environment, start_new_session=True, preexec_fn=lambda: die_with_parent(me)
        )

        def forward(number: int, _: FrameType | None) -> None:
            if not signalled:
                process.send_signal(signal.SIGTERM)
            signalled.append(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        code = process.wait()
        if status.exists():
            return int(status.read_text())
        return INTERRUPTED if signalled and code else code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.launch", description="Run a module under torchrun.")
    parser.add_argument(
        "--gpus", type=int, default=0, help="ranks on this machine; 0: every GPU, or one CPU rank"
    )
    parser.add_argument("--nnodes", type=int, default=1, help="machines")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine")
    parser.add_argument("--rendezvous", default="", help="host:port of the first machine")
    parser.add_argument(
        "--restarts", type=int, default=0, help="starts after a failure, from the newest checkpoint"
    )
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.nnodes > 1 and not options.rendezvous:
        parser.error(f"--nnodes {options.nnodes} needs --rendezvous HOST:PORT, the same on every machine")
    die_with_parent(os.getppid())
    return run(
        command(
            options.module,
            options.arguments,
            ranks_here(options.gpus),
            options.nnodes,
            options.node_rank,
            options.rendezvous,
            options.restarts,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
