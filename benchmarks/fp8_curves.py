"""Does fp8 train as well as bf16? Validation loss of both over several seeds, by the trainer itself.

    python -m benchmarks.fp8_curves TOKENS [--seeds 3] [--steps 600] [--only bf16,fp8] [--json FILE]

TOKENS holds the shards of a corpus, as `gpt2 run` leaves them in the store. GPT-2 124M, 131,072 tokens a step, 6e-4
after 60 steps of warm-up, cosine to a tenth; validation on the first 458,752 tokens. A seed sets both the initial
weights and the order of the data. Runs that are in RUNS already, as far as they are, are not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from training.config import MachineConfig, RunConfig
from training.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]


def configure(seed: int, fp8: bool, steps: int) -> RunConfig:
    base = recipe("gpt2-124m")
    train = replace(
        base.train,
        steps=steps, batch_tokens=131_072, lr=6e-4, warmup_steps=60, final_lr_fraction=0.1, fp8=fp8,
        init_seed=seed, order_seed=seed, val_every=100, val_batches=7, val_sequences=64, hellaswag=False,
        sample_tokens=16, checkpoint_every=steps,
    )  # fmt: skip
    return replace(base, train=train, machine=MachineConfig(micro_batch=64))


def losses(run: Path) -> dict[int, float]:
    """Validation loss by step, from main.log."""
    lines = (line.split() for line in (run / "main.log").read_text().splitlines())
    return {int(words[0][2:]): float(words[1][4:]) for words in lines if words[1].startswith("tel:")}


def train(run: Path, config: RunConfig, tokens: str) -> dict[int, float]:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "training.train", str(run), "--tokens", tokens]
    with open(run / "output.log", "w") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    return losses(run)


def table(curves: dict[str, list[dict[int, float]]]) -> str:
    kinds = [kind for kind in ("bf16", "fp8") if curves.get(kind)]
    steps = sorted(curves[kinds[0]][0])
    lines = ["| step | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [
        f"| {step} | " + " | ".join(mean(c[step] for c in curves[kind]) for kind in kinds) + " |" for step in steps
    ]
    if len(kinds) == 2:
        pairs = [b[steps[-1]] - a[steps[-1]] for a, b in zip(curves["bf16"], curves["fp8"], strict=True)]
        lines.append(f"fp8 less bf16 at the end, seed by seed: {mean(pairs, '+.4f')}")
    return "\n".join(lines)


def mean(values: Iterable[float], form: str = ".4f") -> str:
    """With its standard error."""
    numbers = list(values)
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    return f"{statistics.mean(numbers):{form}} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fp8_curves", description=__doc__)
    parser.add_argument("tokens", help="folder with token shards")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", default="bf16,fp8")
    parser.add_argument("--runs", default="fp8_curves", metavar="RUNS", help="folder for the runs")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU")
    parser.add_argument("--json", default="benchmarks/fp8_curves.json")
    options = parser.parse_args()
    jobs = [(kind, seed) for seed in range(1, options.seeds + 1) for kind in options.only.split(",")]

    def one(job: tuple[str, int]) -> dict[int, float]:
        kind, seed = job
        run = Path(options.runs).absolute() / f"{kind}-{seed}"
        return train(run, configure(seed, kind == "fp8", options.steps), str(Path(options.tokens).absolute()))

    with ThreadPoolExecutor(options.at_once) as pool:
        results = list(pool.map(one, jobs))
    curves: dict[str, list[dict[int, float]]] = {}
    for (kind, _), curve in zip(jobs, results, strict=True):
        curves.setdefault(kind, []).append(curve)
    Path(options.json).write_text(json.dumps({"steps": options.steps, "validation_loss": curves}, indent=1) + "\n")
    print(table(curves))


if __name__ == "__main__":
    main()
