"""How is Dagster served on this machine? A code server, the webserver and the daemon, that all end together.

`dagster dev` starts the same three, but when it is killed they live on, with the port and the runs. Here the kernel
ends them with this process, whatever ends it; runs that they launched end by themselves (pipeline/instance.py).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from training.processes import dying_with

ROOT = Path(__file__).resolve().parent.parent
LOCATION = "gpt2"  # as in workspace.yaml
SERVED_BY = "GPT2_SERVED_BY"  # the process that all of this ends with, for the runs that are launched here
BETA = "ignore:Parameter"  # what Dagster's warnings about its own beta parameters begin with
LOOK_SECONDS = 0.5
STOP_SECONDS = 10.0


def serve(port: int) -> int:
    """Serve on 127.0.0.1 until a signal, or until one of the three dies -> exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.environ[SERVED_BY] = str(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "code")
        workspace = Path(folder, "workspace.yaml")
        workspace.write_text(f"load_from: [{{grpc_server: {{socket: {place}, location_name: {LOCATION}}}}}]\n")
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes.append(_start("dagster", "code-server", "start", "-m", "pipeline.definitions", "-d", str(ROOT),
                                    "--socket", str(place), "--log-level", "warning"))  # fmt: skip
            _wait_for(place, processes[0])
            page = ("dagster_webserver", "-h", "127.0.0.1", "-p", str(port), "-w", str(workspace))
            processes.append(_start(*page, "--dagster-log-level", "warning"))
            processes.append(_start("dagster._daemon", "run", "--log-level", "warning", "-w", str(workspace)))
            while all(process.poll() is None for process in processes):
                time.sleep(LOOK_SECONDS)
            dead = next(process for process in processes if process.poll() is not None)
            sys.stderr.write(f"gpt2: {str(dead.args)} ended with status {dead.returncode}\n")
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            _end(processes)


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    quiet = os.environ | {"PYTHONWARNINGS": BETA}  # what the command starts in its turn has no -W
    return subprocess.Popen(command, cwd=ROOT, env=quiet, preexec_fn=dying_with(os.getpid()))


def _wait_for(place: Path, server: subprocess.Popen[bytes]) -> None:
    """Wait until the code server listens, or has ended."""
    while server.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            if place.exists() and probe.connect_ex(str(place)) == 0:
                return
        time.sleep(LOOK_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """The last that was started first: the webserver and the daemon ask the code server."""
    for process in reversed(processes):
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    for process in reversed(processes):
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
