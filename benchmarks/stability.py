"""Does a run stay well? Its largest attention logit and its activations over the steps, of several runs in one figure.

    python -m benchmarks.stability RUN=1x OTHER_RUN=2x … --out stability.png

RUN is a run's folder, of which metrics.jsonl is read; the text behind = is its label (default: the folder's name). Each
run needs `health_every` set. Prints the largest of each over the run, and the skipped updates.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SHOWN = {
    "attention_logit_max": "largest attention logit",
    "activation_rms": "largest RMS behind a block",
    "loss": "loss",
}


def read(run: str) -> list[dict[str, Any]]:
    """The lines of a run's steps. Raises ValueError where there are none, or none about its health."""
    file = Path(run, "metrics.jsonl")
    if not file.exists():
        raise ValueError(f"there is no {file}: name a run's folder")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not any("attention_logit_max" in line for line in lines):
        raise ValueError(f"{file} says nothing about health: train the run with health_every=100, or less")
    return lines


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps with their value, the largest over the layers."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [max(v) if isinstance(v, list) else v for _, v in found]


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for label, lines in runs.items():
            axes.plot(*series(lines, key), label=label, linewidth=1)
        axes.set(xlabel="step", title=title)
        axes.legend()
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.stability", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="FOLDER or FOLDER=LABEL")
    parser.add_argument("--out", type=Path, default=Path("stability.png"))
    options = parser.parse_args(argv)
    pairs = [given.partition("=") for given in options.run]
    try:
        runs = {label or Path(folder).name: read(folder) for folder, _, label in pairs}
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for label, lines in runs.items():
        largest = [f"{title} {max(series(lines, key)[1]):.3f}" for key, title in SHOWN.items()]
        print(f"{label}: {', '.join(largest)}; last loss {lines[-1]['loss']:.4f}, {lines[-1]['skipped']} skipped")
    draw(runs, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
