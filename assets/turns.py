"""Who makes an output, where several runs or machines on one store want the same? One does, the others wait for it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from storage import objects
from storage.contents import CLAIMS
from training.claims import Claims

POLL = 1.0  # seconds between two looks at whether it is our turn

log = logging.getLogger(__name__)


@contextmanager
def turn(store: str, key: str) -> Iterator[None]:
    """Hold the right to make the output `key`; waits for whoever has it, and takes over from one that died."""
    with Claims(objects.join(store, CLAIMS)) as claims:
        waiting_for = ""
        while not claims.take(key):
            if (owner := claims.owner_of(key)) != waiting_for:
                log.warning("waiting for %s, which is making %s", owner, key)
                waiting_for = owner
            time.sleep(POLL)
        yield


@contextmanager
def turn_or_refusal(store: str, run: str) -> Iterator[None]:
    """Hold the right to train a run. Raises ValueError, naming the holder, where it is trained elsewhere."""
    with Claims(objects.join(store, CLAIMS)) as claims:
        if not claims.take(f"training/{run}"):
            host, process = [*claims.owner_of(f"training/{run}").split(":"), "", ""][:2]
            raise ValueError(
                f"run {run!r} is being trained by process {process} of {host}: wait for it or stop it; if that "
                f"machine is lost, its claim ends after {claims.lease:.0f} seconds"
            )
        yield
