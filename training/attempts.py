"""How long has a run been trained? The wall clock of each of its launches, which is what its GPUs are paid for.

`attempts.json` in the run's folder has when each began and how many seconds it has been seen at work: from the start of
the launch to its end, or to the last note of one that was killed or whose machine was lost.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import objects

FILE = "attempts.json"
NOTE_SECONDS = 30.0  # between two notes that a launch is at work


@contextmanager
def noted(run: Path) -> Iterator[None]:
    """Note in the run's folder that it is being trained, from here to the end."""
    since, began, ended = time.time(), time.monotonic(), threading.Event()

    def note() -> None:
        while True:
            _note(run, since, time.monotonic() - began)
            if ended.is_set():
                return
            ended.wait(NOTE_SECONDS)

    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _note(run: Path, since: float, seconds: float) -> None:
    """Beside the others: a checkpoint that comes from the mirror brings the attempts of another machine with it."""
    others = [attempt for attempt in read(run) if attempt["started"] != since]
    try:
        objects.publish_json(str(run / FILE), [*others, {"started": since, "seconds": round(seconds, 3)}])
    except OSError as error:  # a full disk: the training says so itself, where it needs that
        sys.stderr.write(f"{run / FILE} can't be written: {error}\n")


def read(run: Path) -> list[dict[str, float]]:
    return list(objects.read_json(str(run / FILE))) if (run / FILE).exists() else []
