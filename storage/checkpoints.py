"""Which checkpoints does a run's folder hold, local or on S3, and which of them are complete? Their names say it."""

import re

from storage import objects
from storage.objects import Stat

FOLDER, DONE = "checkpoints", "DONE"  # DONE comes last: without it a checkpoint is torn


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoint_url(run: str, step: int) -> str:
    return objects.join(run, FOLDER, step_name(step))


def done_files(run: str) -> dict[int, Stat]:
    """DONE of each complete checkpoint, by step."""
    found = objects.list_files(objects.join(run, FOLDER), DONE)
    return {int(name[1]): stat for stat in found if (name := re.fullmatch(rf"step_(\d+)/{DONE}", stat.path))}


def complete(run: str) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, oldest first."""
    return sorted(done_files(run))
