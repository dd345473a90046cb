"""Which of several machines does a piece of work, and who takes it over from one that died?

A claim is an object that only one machine can create. Its owner renews it while it works; whoever has seen it
unchanged for the length of a lease takes the work over with the next claim on it; where the owner's processes can be
seen, whoever finds its own gone does so at once. Clocks are not compared: each machine counts by its own. Work done
twice is wasted, never wrong: what is claimed here gives the same bytes. An owner that could not renew its claim for so
long, because the store was out of its reach, is told that it has lost it.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from storage import objects
from training.processes import processes_here, started

LEASE = 60.0  # seconds without a renewal after which work is taken over
RENEWALS = 4  # of a claim during a lease

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """A claim as it was when it last changed."""

    state: str
    since: float
    process: dict[str, Any]


class Claims:
    """The claims of one process in a place that all machines reach. Use as a context: it renews them.

    `on_lost` gets the name of a claim that another has taken over, from the thread that renews; `say`, what went wrong
    with the renewals.
    """

    def __init__(
        self,
        place: str,
        on_lost: Callable[[str], None] = lambda name: None,
        say: Callable[[str], None] = log.warning,
    ):
        self.place, self.lease, self.on_lost, self.say = place, LEASE, on_lost, say
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.process = {"pid": os.getpid(), "started": started(os.getpid()), "among": processes_here()}
        self.lock = threading.Lock()
        self.held: dict[str, int] = {}  # name → number of our claim on it
        self.renewed: dict[str, float] = {}  # name → when our claim on it was last renewed
        self.seen: dict[str, Seen] = {}  # name → the last claim on it
        self.alive: set[str] = set()  # names whose owner was seen to live: it is here, or has renewed its claim
        self.beats = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def __enter__(self) -> "Claims":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        for name in list(self.held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Whether the work `name` is ours now."""
        claims = self._claims_on(name)
        if claims and not self._is_dead(name, claims[-1]):
            return False
        number = int(claims[-1].path) + 1 if claims else 0
        with self.lock:
            taken = objects.create_exclusive(self._url(name, number), self._content())
            if taken:
                self.held[name], self.renewed[name] = number, time.monotonic()
        return taken

    def held_by_others(self) -> set[str]:
        """The work that others are at, by one listing; only claims that have changed since the last are read."""
        last: dict[str, objects.Stat] = {}
        for claim in objects.list_files(self.place):
            name, _, number = claim.path.rpartition("/")
            if name not in self.held:
                last[name] = replace(claim, path=number)
        with ThreadPoolExecutor(16) as pool:
            dead = list(pool.map(self._is_dead, last.keys(), last.values()))
        return {name for name, gone in zip(last, dead, strict=True) if not gone}

    def release(self, name: str) -> None:
        """Give up a claim, on work that is done or that others may do."""
        with self.lock:
            if name in self.held:  # no other has taken it over
                for number in range(self.held.pop(name) + 1):  # with those of the dead before us
                    with contextlib.suppress(FileNotFoundError):
                        objects.remove(self._url(name, number))

    def _claims_on(self, name: str) -> list[objects.Stat]:
        """In their order; those on work whose name goes on from this one lie in folders."""
        return [claim for claim in objects.list_files(objects.join(self.place, name)) if "/" not in claim.path]

    def _url(self, name: str, number: int) -> str:
        return objects.join(self.place, name, f"{number:06d}")

    def _content(self) -> bytes:
        self.beats += 1
        return json.dumps({"owner": self.owner, "process": self.process, "beat": self.beats}).encode()

    def owner_of(self, name: str) -> str:
        """Who has made the last claim on `name`: host:process:digits; "" where there is none."""
        claims = self._claims_on(name)
        return str(self._read(name, claims[-1]).get("owner", "")) if claims else ""

    def _read(self, name: str, claim: objects.Stat) -> dict[str, Any]:
        """What a claim says; empty where it has been released since, or made so lately that its text is to come."""
        try:
            return dict(json.loads(objects.read_bytes(objects.join(self.place, name, claim.path)) or b"{}"))
        except FileNotFoundError:
            return {}

    def _is_dead(self, name: str, last: objects.Stat) -> bool:
        """Whether the last claim's process is gone from here, or was silent for a lease, as long as we watched it."""
        before, state = self.seen.get(name), f"{last.path} {last.modified}"
        if before is None or before.state != state:
            process = self._read(name, last).get("process", {})
            self.seen[name] = Seen(state, time.monotonic(), process)  # counted from here: reading may take long
            if before:
                self.alive.add(name)
        seen = self.seen[name]
        if seen.process.get("among") == processes_here() != "":
            if started(seen.process["pid"]) != seen.process["started"]:
                return True
            self.alive.add(name)
        return time.monotonic() - seen.since > self.lease

    def _keep_renewing(self) -> None:
        while not self.ended.wait(self.lease / RENEWALS):
            with self.lock:
                lost = [name for name in list(self.held) if not self._renew(name)]
            for name in lost:
                self.on_lost(name)

    def _renew(self, name: str) -> bool:
        """Renew a claim, or try again at the next beat where the store fails; False where another has it now."""
        try:
            claims = self._claims_on(name)
            if not claims or int(claims[-1].path) != self.held[name]:  # its new owner may have released it since
                del self.held[name]
                self.say(f"lost the claim on {name}: it was not renewed for so long that another has taken it over")
                return False
            objects.publish_bytes(self._url(name, self.held[name]), self._content())
            self.renewed[name] = time.monotonic()
        except objects.failures() as error:
            silent = time.monotonic() - self.renewed[name]
            risk = ": another machine may take the work over" if silent > self.lease else ", trying again"
            self.say(f"the claim on {name} could not be renewed for {silent:.0f} seconds ({error}){risk}")
        return True
