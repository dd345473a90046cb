"""What does a run write down while it trains? main.log, metrics.jsonl, and the figures in them.

`main.log` holds llm.c's lines and nothing else, in the order of the steps, so that its plotting notebook
reads it. Both files are cut back to the checkpoint's step on resume: they end up as if nothing had been
interrupted.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MAIN_LOG, METRICS = "main.log", "metrics.jsonl"

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


class RunLog:
    """The two files of a run folder; on ranks other than the first, a log that goes nowhere."""

    def __init__(self, folder: str | None, step: int) -> None:
        self.folder = folder
        self.cut_back(step)

    def cut_back(self, step: int) -> None:
        """Drop what was written at `step` and later."""
        if self.folder is not None:
            _cut_back(Path(self.folder, MAIN_LOG), lambda line: int(line.split()[0].removeprefix("s:")) < step)
            _cut_back(Path(self.folder, METRICS), lambda line: json.loads(line)["step"] < step)
        self.main = _append(self.folder, MAIN_LOG)
        self.lines = _append(self.folder, METRICS)

    def training(self, step: int, loss: float, lr: float, norm: float) -> None:
        _write(self.main, f"s:{step} trl:{loss:.6f} lr:{lr:.6e} norm:{norm:.4f}")

    def validation(self, step: int, loss: float) -> None:
        _write(self.main, f"s:{step} tel:{loss:.6f}")

    def accuracy(self, step: int, accuracy: float) -> None:
        _write(self.main, f"s:{step} eval:{accuracy:.6f}")

    def skip(self, step: int, z: float) -> None:
        _write(self.main, f"s:{step} skip:{z:.4f}")

    def metrics(self, step: int, **values: Any) -> None:
        _write(self.lines, json.dumps({"step": step, **values}))


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a GPU; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def utilization(tokens_per_second: float, flops_per_token: int, ranks: int, device_name: str) -> float | None:
    """MFU by llm.c's formula; None where the device's peak is not known."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (ranks * peak)


def _append(folder: str | None, name: str) -> IO[str]:
    return open(os.devnull if folder is None else os.path.join(folder, name), "a")


def _write(file: IO[str], line: str) -> None:
    file.write(line + "\n")
    file.flush()


def _cut_back(path: Path, keep: Callable[[str], bool]) -> None:
    """Drop the lines that `keep` refuses, and a last line that was only partly written."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line for line in lines if line.endswith("\n") and keep(line)))
        partial.replace(path)
