"""Which process is that, does it still live, how does one end with its parent or keep a lock? What Linux does."""

import ctypes
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


@cache
def processes_here() -> str:
    """Names the processes that this one can see: those of this boot and container, which a host's name does not tell.

    Empty where the kernel does not say.
    """
    boot, container = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    there = boot.exists() and os.path.lexists(container)
    return f"{boot.read_text().strip()} {os.readlink(container)}" if there else ""


def started(pid: int) -> str:
    """When a process started, in ticks since boot, which tells it from a later one of the same number.

    "gone" for one that has ended, also where its parent has not asked how.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if words[0] in "ZX" else words[19]


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[IO[str]]:
    """Hold a file's lock, after whoever has it, which `on_wait` may tell a user.

    It lasts as long as any process that has inherited the open file lives, however they end.
    """
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends; `parent` is the pid to expect."""
    dying_with(parent)()


def dying_with(parent: int) -> Callable[[], None]:
    """The same for a child to call between fork and exec: where the parent has threads, one of them may have held
    the lock of the dynamic loader, so what needs it is done here."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before the call
            os.kill(os.getpid(), signal.SIGTERM)

    return tie
