"""Who makes an output, where several runs or machines on one store want the same? One does, the others wait for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage import objects
from storage.contents import CLAIMS
from training.claims import Claims

POLL = 1.0  # seconds between two looks at whether it is our turn


@contextmanager
def turn(store: str, key: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the right to make the output `key`; waits for whoever has it, which `say` is told, and takes over from one
    that died."""
    with Claims(objects.join(store, CLAIMS)) as claims:
        waiting_for = ""
        while not claims.take(key):
            if (owner := claims.owner_of(key)) not in ("", waiting_for):
                host, process = owner.split(":")[:2]
                say(f"waiting for process {process} of {host}, which makes {key}: this one does, should that end")
                waiting_for = owner
            time.sleep(POLL)
        yield


@contextmanager
def turn_or_refusal(store: str, run: str, say: Callable[[str], None], lost: Callable[[], None]) -> Iterator[None]:
    """Hold the right to train a run; takes over from a machine that is silent for a lease.

    `say` is told what is waited for, and what goes wrong meanwhile; `lost` is called, from a thread, where the store
    was out of reach for so long that another machine trains the run now. Raises ValueError, naming the holder, where
    it is being trained elsewhere.
    """
    work = f"training/{run}"
    with Claims(objects.join(store, CLAIMS), lambda _: lost(), say) as claims:
        waiting = False
        while not claims.take(work):
            host, process = [*claims.owner_of(work).split(":"), "", ""][:2]
            if work in claims.alive:
                raise ValueError(f"run {run!r} is being trained by process {process} of {host}: wait for it or stop it")
            if host and not waiting:
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + claims.lease))
                say(f"process {process} of {host} has claimed this run: waiting until {until} for a sign of life")
                waiting = True
            time.sleep(POLL)
        yield
