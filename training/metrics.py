"""What does a run write down while it trains? main.log, metrics.jsonl, lost.jsonl, and the figures in them.

`main.log` holds llm.c's lines and nothing else, in the order of the steps, so that its plotting notebook
reads it. It and `metrics.jsonl` are cut back to the checkpoint's step on resume: they end up as if nothing had been
interrupted. What is cut off was paid for all the same: `lost.jsonl` has a line for each restart and each rewind.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage import events, objects
from training import attempts

MAIN_LOG, METRICS, LOST = "main.log", "metrics.jsonl", "lost.jsonl"
# a run's, copied to its mirror beside checkpoints
LOGS = (MAIN_LOG, METRICS, LOST, attempts.FILE, "train.log", "samples.txt")

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


log = logging.getLogger("gpt2.metrics")


class Lines:
    """A file that lines are added to. What a full disk does not take is kept, and written once it does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.left = b""
        self.turn = threading.Lock()  # a checkpoint's thread writes, too

    def add(self, line: str) -> None:
        whole = not self.left
        try:
            self.write(line.encode() + b"\n")
        except OSError as error:
            if whole:
                said = f"{self.path} can't be written ({error}): its lines are kept in memory, training goes on"
                log.error(said)
                events.warn(said)

    def write(self, more: bytes = b"") -> None:
        with self.turn:
            self.left += more
            while self.left:
                self.left = self.left[self.file.write(self.left) :]

    def sync(self) -> None:
        """Have the disk hold all lines. Raises OSError where it does not take them."""
        self.write()
        objects.sync(self.path)


class RunLog:
    """The two files of a run folder; on ranks other than the first, a log that goes nowhere."""

    def __init__(self, folder: str | None, step: int) -> None:
        self.folder = folder
        self.files: list[Lines] = []
        self.cut_back(step, "restart")

    def cut_back(self, step: int, why: str) -> None:
        """Drop what was written at `step` and later, and note what these steps took; `why`: restart or rewind."""
        for file in self.files:
            file.write()
        if self.folder is not None:
            _lose(Path(self.folder), step, why)
            _cut_back(Path(self.folder, MAIN_LOG), lambda line: int(line.split()[0].removeprefix("s:")) < step)
            _cut_back(Path(self.folder, METRICS), lambda line: json.loads(line)["step"] < step)
        self.files = [Lines(self._path(name)) for name in (MAIN_LOG, METRICS)]
        self.main, self.lines = self.files

    def _path(self, name: str) -> str:
        return os.devnull if self.folder is None else os.path.join(self.folder, name)

    def sync(self) -> None:
        """Have the disk hold all that was written."""
        for file in self.files:
            file.sync()

    def training(self, step: int, loss: float, lr: float, norm: float) -> None:
        self.main.add(f"s:{step} trl:{loss:.6f} lr:{lr:.6e} norm:{norm:.4f}")

    def validation(self, step: int, loss: float) -> None:
        self.main.add(f"s:{step} tel:{loss:.6f}")

    def accuracy(self, step: int, accuracy: float) -> None:
        self.main.add(f"s:{step} eval:{accuracy:.6f}")

    def skip(self, step: int, z: float) -> None:
        self.main.add(f"s:{step} skip:{z:.4f}")

    def metrics(self, step: int, **values: Any) -> None:
        self.lines.add(json.dumps({"step": step, **values}))


def ledger(folder: Path) -> dict[str, float | int | None]:
    """What a run took, all that was lost included: seconds, the joules of its steps, and how much of these was of use.

    Seconds are the wall clock of every launch: starting, waiting for shards, validation, samples and saving count like
    steps. Goodput is useful steps over all steps that were made. What could not be read is None.
    """
    kept = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    lost = [json.loads(line) for line in (folder / LOST).read_text().splitlines()] if (folder / LOST).exists() else []
    paid = len(kept) + sum(line["steps"] for line in lost)
    launched = sum(attempt["seconds"] for attempt in attempts.read(folder))
    in_steps = sum(line["seconds"] for line in [*kept, *lost])
    return {
        # of the steps where torchrun was started by hand, or before launches were noted
        "seconds": max(launched, in_steps),
        "joules": _joules([*kept, *lost]),
        "goodput": len(kept) / paid if paid else None,
        "restarts": sum(line["why"] == "restart" for line in lost),
        "rewinds": sum(line["why"] == "rewind" for line in lost),
        "skipped_updates": kept[-1]["skipped"] if kept else 0,
    }


def _joules(lines: Sequence[dict[str, Any]]) -> float | None:
    """Their sum; None where one of them is not known, since the rest would pass for all."""
    known = [line["joules"] for line in lines if line.get("joules") is not None]
    return sum(known) if known and len(known) == len(lines) else None


def _lose(folder: Path, step: int, why: str) -> None:
    path = folder / METRICS
    if not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    dropped = [line for line in lines if line["step"] >= step]
    seconds = sum(line["seconds"] for line in dropped)
    joules = _joules(dropped) if dropped else 0.0
    entry = {"why": why, "step": step, "steps": len(dropped), "seconds": seconds, "joules": joules}
    before = (folder / LOST).read_text() if (folder / LOST).exists() else ""
    objects.publish_bytes(str(folder / LOST), f"{before}{json.dumps(entry)}\n".encode())


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a GPU; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def utilization(tokens_per_second: float, flops_per_token: int, ranks: int, device_name: str) -> float | None:
    """MFU by llm.c's formula; None where the device's peak is not known."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (ranks * peak)


def _cut_back(path: Path, keep: Callable[[str], bool]) -> None:
    """Drop the lines that `keep` refuses, and a last line that was only partly written."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line for line in lines if line.endswith("\n") and keep(line)))
        partial.replace(path)
