"""The whole chain in a test: a run small enough to be made once and looked at by many tests."""

import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.places import places

ROOT = Path(__file__).resolve().parent.parent


# A run small enough for a test, with every stage of a large one.
TINY = {
    "steps": "6",
    "batch_tokens": "512",
    "layers": "1",
    "channels": "32",
    "heads": "2",
    "context": "64",
    "warmup_steps": "2",
    "val_every": "3",
    "val_sequences": "8",
    "checkpoint_every": "2",
    "keep_every": "4",
    "sample_tokens": "8",
    "completion_items": "12",
    "harness_items": "8",
}
TINY_SETTINGS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Finished:
    """A store in which `gpt2 run` has made the run `tiny`, and what the command answered."""

    store: str
    answer: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | places(self.store).variables()


def copied(store: str, folder: Path, *left_out: str) -> str:
    """A store with the outputs of another, and a Dagster of its own: what a test makes there, no other sees."""
    shutil.copytree(store, folder / "store", ignore=shutil.ignore_patterns("dagster", *left_out))
    return str(folder / "store")


def gpt2(*arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """The `gpt2` command as a user runs it."""
    command = [sys.executable, "-m", "pipeline.commands.main", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)


def free_port() -> int:
    """A port of 127.0.0.1 for a server to come. Linux gives none below 32768 to who asks for any, so none takes it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
