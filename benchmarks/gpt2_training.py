"""How fast are GPT-2's sizes trained on one GPU? The table of the README, one command on a GPU machine.

    python -m benchmarks.gpt2_training [--only d48,d12] [--json benchmarks/gpt2_training.json]

Each row is a process of its own: `python -m training.bench`, ten steps of the whole trainer after three of warm-up. It
is written down with its environment as it comes; rows that are not measured anew stay as they were.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LLM_C = {"d12": 567_000, "d48": 51_800}  # tokens/s on one H200 with cuDNN attention, the same batches


@dataclass(frozen=True)
class Row:
    model: str
    micro_batch: int
    batch_tokens: int
    fp8: bool


ROWS = [
    Row(model, micro_batch, batch_tokens, fp8)
    for model, micro_batch, batch_tokens in (
        ("d48", 16, 131_072), ("d12", 64, 524_288), ("d24", 64, 131_072), ("d36", 32, 131_072),
    )
    for fp8 in (False, True)
]  # fmt: skip


def measure(row: Row) -> dict[str, Any] | None:
    """The bench's result; None where the process failed, whose messages are on the terminal."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", "training.bench", row.model, "--micro-batch", str(row.micro_batch),
            "--batch-tokens", str(row.batch_tokens), "--profile", "--json", file.name,
        ]  # fmt: skip
        status = subprocess.run([*command, *(["--fp8"] if row.fp8 else [])], cwd=ROOT).returncode
        return json.loads(Path(file.name).read_text()) if status == 0 else None


def environment() -> dict[str, str]:
    """What a row was measured with; the bench itself names card and PyTorch."""
    import torch

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    packages = {name: package_version(name) for name in ("triton", "nvidia-cudnn-frontend", "nvidia-cublas")}
    return packages | {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def keep(file: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, in place of an earlier one of the same model and products."""
    kept = json.loads(file.read_text())["results"] if file.exists() else []
    rows = [r for r in kept if (r["model"], r["fp8"]) != (row["model"], row["fp8"])] + [row]
    models = [known.model for known in ROWS]
    rows.sort(key=lambda r: (models.index(r["model"]), r["fp8"]))
    file.write_text(json.dumps({"results": rows}, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model, micro-batch | products | ms a step (tokens) | tokens/s | against llm.c | MFU | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        against = f"{r['tokens_per_second'] / LLM_C[r['model']] - 1:+.1%}" if r["model"] in LLM_C else ""
        lines.append(
            f"| {r['model']}, {r['micro_batch']} | {'fp8' if r['fp8'] else 'bf16'} "
            f"| {r['step_ms']:,.0f} ({r['batch_tokens']:,}) | {r['tokens_per_second']:,} | {against} "
            f"| {r['mfu']:.1%} | {r['peak_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpt2_training", description=__doc__)
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/gpt2_training.json")
    options = parser.parse_args()
    known = [*dict.fromkeys(row.model for row in ROWS)]
    only = options.only.split(",") if options.only else known
    if unknown := sorted({*only} - {*known}):
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(known)}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in ROWS if row.model in only]
    results = []
    for row in wanted:
        if (result := measure(row)) is not None:
            results.append(result | environment())
            keep(options.json, results[-1])
    print(table(results))
    return int(len(results) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
