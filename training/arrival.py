"""Which training shards are here, while others are still being fetched or made?

Training may begin once the validation shard and the first training shard are there. Shards are read in
order, so the batches are the same as if all had been there: a position of the first epoch lies in the
shards before it, whatever comes later, and a second epoch begins only when the folder says that it is
complete.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage import objects
from storage.shards import COMPLETE, PLAN, read_header, shard_paths

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between two looks


@dataclass
class Arrivals:
    """The training shards of a folder in corpus order, as they come; those on S3 are copied to `local`."""

    folder: str
    local: str = ""
    paths: list[str] = field(default_factory=list)
    complete: bool = False
    told: int = -1  # shards that were here when it was last said that another is waited for

    def look(self, most: int | None = None) -> bool:
        """Take in what has come since, at most so many shards; whether any has, or the last has been seen."""
        complete = not objects.exists(objects.join(self.folder, PLAN)) or objects.exists(
            objects.join(self.folder, COMPLETE)
        )
        there = self._whole_prefix(shard_paths(self.folder, "train"))
        new = there[len(self.paths) :][:most]
        self.paths += [self._here(url) for url in new]
        changed = bool(new) or complete != self.complete
        self.complete = complete
        return changed

    def _whole_prefix(self, urls: list[str]) -> list[str]:
        """Shards without a gap before them: several machines may finish later ones first."""
        numbered = {int(url.removesuffix(".bin").rsplit("_", 1)[1]): url for url in urls}
        first = min(numbered, default=1)
        count = next(n for n in range(len(numbered) + 1) if first + n not in numbered)
        return [numbered[first + n] for n in range(count)] if first == 1 else []

    def _here(self, url: str) -> str:
        if not objects.is_local(url):
            path = objects.join(self.local, objects.name_of(url))
            objects.fetch(url, path)
            url = path
        read_header(url)
        return url

    def wait(self, shards: int) -> None:
        """Return once so many training shards are here, or all that there will be; says so when it waits."""
        self.look()
        while len(self.paths) < shards and not self.complete:
            self.pause()
            self.look()

    def pause(self) -> None:
        """Wait before the next look, with a line in the log for each shard that is waited for."""
        if self.told != len(self.paths):
            log.info("waiting for training shard %d of %s", len(self.paths) + 1, self.folder)
            self.told = len(self.paths)
        time.sleep(POLL)


def stage_as_they_come(
    folder: str, local: str, cancelled: threading.Event, failed: Callable[[Exception], None]
) -> bool:
    """Return once the validation shard and the first training shard are in `local` -> False if cancelled before.

    Where `folder` is on S3, a thread goes on to copy the others from there as they come, and then what says that
    these are all. `failed` is told, from that thread, why it can't.
    """
    arrivals = Arrivals(folder, local)
    while True:
        validation = shard_paths(folder, "val")
        if validation:
            arrivals.look(1)
        if arrivals.paths:
            break
        if cancelled.wait(POLL):
            return False
    if folder != local:
        for url in (*validation, objects.join(folder, PLAN)):
            objects.fetch(url, objects.join(local, objects.name_of(url)))
        threading.Thread(target=_go_on, args=(arrivals, cancelled, failed), daemon=True).start()
    return True


def _go_on(arrivals: Arrivals, cancelled: threading.Event, failed: Callable[[Exception], None]) -> None:
    while not cancelled.wait(POLL):
        try:
            arrivals.look()
            if arrivals.complete:
                objects.fetch(objects.join(arrivals.folder, COMPLETE), objects.join(arrivals.local, COMPLETE))
                return
        except objects.failures() as error:
            log.warning("%s can't be copied now (%s): trying again in %.0f s", arrivals.folder, error, POLL)
        except Exception as failure:
            failed(failure)
            return
