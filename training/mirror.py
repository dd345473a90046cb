"""How does what a run has saved come to a place that outlives its machine, and from there to another machine?"""

import logging
import shutil
import threading
import time
from pathlib import Path

from storage import events, objects
from storage.checkpoints import DONE, FOLDER, checkpoint_url, complete, step_name
from training.checkpoint import Keep, checkpoint_folder, damage, publish, remove
from training.metrics import LOGS

RETRY = 30.0  # seconds after an upload that failed, until the next try

log = logging.getLogger("gpt2.mirror")


class Mirror:
    """Copies a run's newest checkpoint and its logs to `url`, in a thread beside the training.

    What fails is said and tried again, with the newest checkpoint by then: a store that is slow, or away for a while,
    neither ends a training nor holds it up.
    """

    def __init__(self, run: str, url: str, keep: Keep) -> None:
        self.run, self.url, self.keep = run, url, keep
        self.sending: int | None = None  # the step whose files are read now: they have to stay
        self.news, self.ended = threading.Event(), threading.Event()
        self.news.set()  # the last end may have come before its upload
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        while self.news.wait() and not self.ended.is_set():
            self.news.clear()
            while not self._try():
                if self.ended.wait(RETRY):
                    return

    def finish(self, seconds: float) -> bool:
        """Upload what is lacking, and try again for so long if that fails -> whether the mirror has it all."""
        self.ended.set()
        self.news.set()
        self.thread.join()
        deadline = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() + RETRY > deadline:
                return False
            time.sleep(RETRY)
        return True

    def _try(self) -> bool:
        try:
            self.upload()
        except Exception as error:  # of the store, its client or the network, of which each has its own kinds
            said = f"{self.url} can't be written now ({error}): the training goes on, and so do tries"
            log.warning(said)
            events.warn(said)
            return False
        finally:
            self.sending = None
        return True

    def upload(self) -> None:
        """Copy what the mirror lacks, and the logs as they are now, and drop what is not to be kept there."""
        here = complete(self.run)
        lacking = self._lacking(here)
        for step in lacking:
            self._copy(step)
        if not lacking:  # else they went with the checkpoint
            self._copy_logs()
        if here:
            there = complete(self.url)
            later = [step for step in there if step > here[-1]]  # than where a run that diverged went back to
            remove(self.url, [*later, *self.keep.drops([step for step in there if step <= here[-1]])])

    def _lacking(self, here: list[int]) -> list[int]:
        """The newest checkpoint, first of all, and those that are kept for good; one in between may be left out."""
        there = complete(self.url)
        wanted = [*here[-1:], *(step for step in here[:-1] if self.keep.for_good(step))]
        return [step for step in wanted if not self._has(step, there)]

    def _copy(self, step: int) -> None:
        """DONE comes last, after the logs: who goes on from this checkpoint needs their lines before it."""
        self.sending = step
        folder, there = checkpoint_folder(self.run, step), self._at(step)
        if objects.exists(objects.join(there, DONE)):  # of the same step, which a run that diverged has saved anew
            objects.remove(objects.join(there, DONE))
        for found in objects.list_files(str(folder)):
            if found.path != DONE:
                objects.publish_file(str(folder / found.path), objects.join(there, found.path))
        self._copy_logs()
        objects.publish_bytes(objects.join(there, DONE), self._done(step))

    def _copy_logs(self) -> None:
        for name in LOGS:
            if Path(self.run, name).exists():
                objects.publish_file(str(Path(self.run, name)), objects.join(self.url, name))

    def _has(self, step: int, there: list[int]) -> bool:
        return step in there and objects.read_bytes(objects.join(self._at(step), DONE)) == self._done(step)

    def _done(self, step: int) -> bytes:
        return (checkpoint_folder(self.run, step) / DONE).read_bytes()

    def _at(self, step: int) -> str:
        return checkpoint_url(self.url, step)


def fetch_newest(mirror: str, run: str) -> None:
    """Copy the mirror's newest whole checkpoint, and the logs with it, where the run folder has none so new."""
    here = complete(run)
    for step in reversed(complete(mirror)):
        if here and here[-1] >= step:
            return
        hidden = Path(run, FOLDER, f".{step_name(step)}")
        log.info("fetching %s from %s", step_name(step), mirror)
        shutil.rmtree(hidden, ignore_errors=True)
        objects.copy_tree(checkpoint_url(mirror, step), str(hidden))
        if wrong := damage(hidden):
            log.error("passed over %s of %s: %s", step_name(step), mirror, wrong)
            continue
        for name in LOGS:
            if objects.exists(objects.join(mirror, name)):
                objects.copy(objects.join(mirror, name), str(Path(run, name)))
        done = (hidden / DONE).read_bytes()
        (hidden / DONE).unlink()
        publish(hidden, done)
        return
