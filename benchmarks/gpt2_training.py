"""How fast are GPT-2's sizes trained on one GPU? The table of the README, one command on a GPU machine.

    python -m benchmarks.gpt2_training [--only d48,d12] [--json benchmarks/gpt2_training.json]

Each row is a process of its own: `python -m training.bench`, ten steps of the whole trainer after three of warm-up.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
    """Driver, commit and date; the bench itself names card and PyTorch."""

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


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
    parser.add_argument("--json", default="benchmarks/gpt2_training.json")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else [row.model for row in ROWS]
    results = []
    for row in ROWS:
        if row.model in only and (result := measure(row)) is not None:
            results.append(result)
            Path(options.json).write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n")
    print(table(results))
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
