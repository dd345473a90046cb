"""Does fp8 train as well as bf16? Validation loss of both over several seeds, by the trainer itself.

    python -m benchmarks.fp8_curves TOKENS [--seeds 1 2 3] [--steps 600] [--json FILE]

TOKENS holds the shards of a corpus, as `gpt2 run` leaves them in the store. GPT-2 124M, 131,072 tokens a step, 6e-4
after 60 steps of warm-up, cosine to a tenth; validation on the first 458,752 tokens. A seed sets both the initial
weights and the order of the data. Each GPU trains one run at a time; FILE is written after each, and what it holds is
not trained again.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training.config import MachineConfig, RunConfig
from training.launch import gpu_count
from training.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("bf16", "fp8")


def configure(seed: int, fp8: bool, steps: int) -> RunConfig:
    base = recipe("gpt2-124m")
    train = replace(
        base.train,
        steps=steps, batch_tokens=131_072, lr=6e-4, warmup_steps=60, final_lr_fraction=0.1, fp8=fp8,
        init_seed=seed, order_seed=seed, val_every=100, val_batches=7, val_sequences=64, hellaswag=False,
        sample_tokens=16, checkpoint_every=steps,
    )  # fmt: skip
    return replace(base, train=train, machine=MachineConfig(gpus=1, micro_batch=64))


def losses(run: Path) -> dict[str, float]:
    """Validation loss by step, from main.log."""
    lines = (line.split() for line in (run / "main.log").read_text().splitlines())
    return {words[0][2:]: float(words[1][4:]) for words in lines if words[1].startswith("tel:")}


def train(run: Path, config: RunConfig, tokens: Path, gpu: int) -> dict[str, float]:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "training.train", str(run), "--tokens", str(tokens)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with open(run / "output.log", "w") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return losses(run)


def table(curves: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means over the seeds that both kinds have."""
    seeds = sorted(curves["bf16"].keys() & curves["fp8"].keys())
    lines = [f"| step (seeds {', '.join(seeds)}) | bf16 | fp8 | fp8 less bf16, seed by seed |", "|---" * 4 + "|"]
    for step in curves["bf16"][seeds[0]] if seeds else ():
        bf16, fp8 = ([curves[kind][seed][step] for seed in seeds] for kind in KINDS)
        less = [b - a for a, b in zip(bf16, fp8, strict=True)]
        lines.append(f"| {step} | {mean(bf16)} | {mean(fp8)} | {mean(less, '+.4f')} |")
    return "\n".join(lines)


def mean(values: Iterable[float], form: str = ".4f") -> str:
    """With its standard error."""
    numbers = list(values)
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    return f"{statistics.mean(numbers):{form}} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fp8_curves", description=__doc__)
    parser.add_argument("tokens", type=Path, help="folder with token shards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--runs", type=Path, default=Path("fp8_curves"), help="folder for the runs")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/fp8_curves.json")
    options = parser.parse_args()
    found: dict[str, Any] = {"steps": options.steps, "validation_loss": {kind: {} for kind in KINDS}}
    if options.json.exists():
        found = json.loads(options.json.read_text())
    curves = found["validation_loss"]
    free: queue.Queue[int] = queue.Queue()
    for gpu in range(gpu_count()):
        free.put(gpu)

    def one(kind: str, seed: int) -> tuple[str, int, dict[str, float]]:
        gpu = free.get()
        try:
            run = options.runs.absolute() / f"{kind}-{seed}"
            return kind, seed, train(run, configure(seed, kind == "fp8", options.steps), options.tokens.absolute(), gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpu_count()) as pool:
        wanted = [(kind, seed) for seed in options.seeds for kind in KINDS if str(seed) not in curves[kind]]
        for future in as_completed([pool.submit(one, *job) for job in wanted]):
            kind, seed, curve = future.result()
            curves[kind][str(seed)] = curve
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(curves))


if __name__ == "__main__":
    main()
