"""How many tokens and seconds does a recipe take to a loss? The trainer itself, over seeds and over variants.

    python -m benchmarks.time_to_loss --corpus TOKENS_OR_PARQUET --val TOKENS_OR_PARQUET [--recipe speedrun-124m]
        [--seeds 5] [--steps 1200] [--set lr=1e-3 …] [--variant NAME:key=value,key=value …] [--json FILE]
    python -m benchmarks.time_to_loss --corpus TOKENS_OR_PARQUET --split 500000 …      to choose settings

A seed sets both the initial weights and the order of the data. Validation is on the first 458,752 tokens, at step 0,
every --val-every steps and at the end. Training time is the sum of the steps' seconds as the trainer takes them
(waiting for data, forward, backward, clipping, the optimizer), with the first three, which compile, counted as the
median of the ten after them. Validation, saving and the process's start are not in it, nor is what the optimizer still
does on the GPU when a validation begins: with --val-every 5 about half a percent. The target is passed at the first
validation that is not above it: nothing is interpolated. Memory is the allocator's peak, validation included.

One run at a time on each GPU. FILE is written after each run, and what it or --runs holds is not trained again; after a
change of the code give other names. A run that fails is a line of the table and is tried again by the next call.
"""

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.token_corpora import Corpora, prepare
from storage import objects
from storage.records import code_state
from training.config import RunConfig, to_dict
from training.gpus import gpu_ids, gpu_names
from training.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
TARGET = 4.789  # llm.c's d12 after the same 78.6M tokens
COMPILING, AFTER = 3, 10  # steps
VALIDATED = 458_752  # tokens: 448 sequences of 1024
GIB = 2**30
RECIPE = "recipe"  # the key of a variant that names another one


@dataclass(frozen=True)
class Job:
    variant: str
    seed: int
    config: RunConfig
    corpora: Corpora
    program: tuple[str, ...] = ("training.train",)  # the module that trains, and what its arguments begin with

    @property
    def name(self) -> str:
        """Other settings, or other tokens, are another run."""
        defined = [to_dict(self.config), self.corpora.named()]
        digest = hashlib.sha256(json.dumps(defined, sort_keys=True).encode()).hexdigest()
        return f"{self.variant}-{digest[:8]}-seed{self.seed}"


def configure(name: str, settings: Sequence[str], seed: int, options: argparse.Namespace) -> RunConfig:
    """The recipe, cut to the benchmark's steps and batch; `settings` come last. A warm-up that none of them sets takes
    a tenth of the steps at most."""
    ours = {
        "steps": options.steps, "batch_tokens": options.batch_tokens, "init_seed": seed, "order_seed": seed,
        "val_every": options.val_every, "val_batches": 1, "train.hellaswag": "false",
        "sample_every": 0, "sample_tokens": 16, "checkpoint_every": options.steps,
        "gpus": 1, "micro_batch": options.micro_batch,
    }  # fmt: skip
    config = recipe(name, [*(f"{key}={value}" for key, value in ours.items()), *settings])
    train = replace(config.train, val_sequences=max(1, options.val_tokens // config.model.context))
    if train.warmup_steps == recipe(name).train.warmup_steps:
        train = replace(train, warmup_steps=min(train.warmup_steps, train.steps // 10))
    return replace(config, train=train)


def variant_jobs(text: str, options: argparse.Namespace, corpora: Corpora) -> list[Job]:
    """NAME:key=value,key=value for each seed, over what --set says."""
    name, _, listed = text.partition(":")
    settings = [setting for setting in listed.split(",") if setting]
    chosen = [s.partition("=")[2] for s in settings if s.startswith(f"{RECIPE}=")]
    settings = [*options.set, *(s for s in settings if not s.startswith(f"{RECIPE}="))]
    configs = [(n, configure((chosen or [options.recipe])[0], settings, n, options)) for n in seeds(options)]
    return [Job(name, seed, config, corpora) for seed, config in configs]


def seeds(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


async def train(job: Job, run: Path, gpu: str | None) -> dict[str, Any]:
    """Train the run of a folder, unless it is there whole -> its figures, or what ended it."""
    if not whole(run, job.config.train.steps):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(to_dict(job.config)))
        started = time.perf_counter()
        status = await trained(job, run, gpu)
        (run / "wall.json").write_text(json.dumps(time.perf_counter() - started))
        if status:
            last = (run / "output.log").read_text().splitlines()[-1:]
            return {"failed": f"exit status {status}: {' '.join(last)}"[:300]}
    return figures(run, job.config)


async def trained(job: Job, run: Path, gpu: str | None) -> int:
    """The trainer's exit status. It ends with the task that waits for it, without a checkpoint."""
    command = [sys.executable, "-m", *job.program, str(run), "--tokens", job.corpora.folder]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with open(run / "output.log", "w") as log:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def whole(run: Path, steps: int) -> bool:
    return (run / "wall.json").exists() and max(map(int, validation_losses(run)), default=-1) == steps


def validation_losses(run: Path) -> dict[str, float]:
    """By step, from main.log."""
    lines = (
        (line.split() for line in (run / "main.log").read_text().splitlines()) if (run / "main.log").exists() else ()
    )
    return {words[0][2:]: float(words[1][4:]) for words in lines if words[1].startswith("tel:")}


def figures(run: Path, config: RunConfig) -> dict[str, Any]:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = step_seconds([step["seconds"] for step in steps])
    total = sum(seconds)
    losses = validation_losses(run)
    return {
        "final_loss": losses[str(config.train.steps)],
        "seconds": total,
        "seconds_until": {step: sum(seconds[: int(step)]) for step in losses},
        "tokens_per_second": config.tokens / total,
        "peak_gib": max(step.get("memory", 0) for step in steps) / GIB,
        "skipped_updates": steps[-1]["skipped"],
        "attention_logit_max": max(
            (max(s["attention_logit_max"]) for s in steps if "attention_logit_max" in s), default=0
        ),
        "activation_rms_max": max((max(s["activation_rms"]) for s in steps if "activation_rms" in s), default=0),
        "process_seconds": json.loads((run / "wall.json").read_text()),
        "losses": losses,
    }


def step_seconds(measured: Sequence[float]) -> list[float]:
    """Of each step; the first ones compile, so they count as what the next ones usually take."""
    usual = statistics.median(measured[COMPILING : COMPILING + AFTER] or measured)
    return [usual] * len(measured[:COMPILING]) + list(measured[COMPILING:])


def passed(result: dict[str, Any], target: float) -> tuple[int, float] | None:
    """(step, seconds) of the first validation at or below the target."""
    steps = [step for step, loss in result["losses"].items() if loss <= target]
    return (int(steps[0]), result["seconds_until"][steps[0]]) if steps else None


def table(results: Iterable[dict[str, Any]], target: float) -> str:
    """A line a variant: means over its seeds with their standard errors; to the target, over those that came there."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], []).append(result)
    head = ("variant", "seeds", "final loss", "training, s", f"step at {target}", f"seconds to {target}")
    lines = [_line((*head, "tokens/s", "GiB")), _line(["---"] * 8)]
    for name, all_of_it in by_variant.items():
        made = [result for result in all_of_it if "failed" not in result]
        there = [at for result in made if (at := passed(result, target))]
        some = f" ({len(there)} of {len(made)})" if 0 < len(there) < len(made) else ""
        lines.append(
            _line(
                (name, f"{len(made)}" + (f" of {len(all_of_it)}" if len(made) < len(all_of_it) else ""))
                + (mean([r["final_loss"] for r in made], ".4f"), mean([r["seconds"] for r in made], ".1f"))
                + (mean([step for step, _ in there], ".0f") + some, mean([s for _, s in there], ".1f") + some)
                + (mean([r["tokens_per_second"] for r in made], ",.0f"), mean([r["peak_gib"] for r in made], ".1f"))
            )
        )
        lines += [f"  {name}, seed {r['seed']}: {r['failed']}" for r in all_of_it if "failed" in r]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def mean(values: Sequence[float], form: str) -> str:
    """With its standard error where there are several; a dash without any."""
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


Table = Callable[[Sequence[dict[str, Any]]], str]  # two lines of head, then one a variant


async def run_all(jobs: Sequence[Job], options: argparse.Namespace, found: dict[str, Any], table_of: Table) -> None:
    """Train what is missing of `found`, several at once, and write it down after each; an error ends them all."""
    commit, dirty = code_state()
    gpus: Sequence[str | None] = gpu_ids() or [None]
    places: asyncio.Queue[str | None] = asyncio.Queue()
    for place in range(options.at_once or len(gpus)):
        places.put_nowait(gpus[place % len(gpus)])

    async def one(job: Job) -> tuple[Job, dict[str, Any]]:
        gpu = await places.get()
        try:
            return job, await train(job, options.runs.absolute() / job.name, gpu)
        finally:
            places.put_nowait(gpu)
            if not options.keep:
                shutil.rmtree(options.runs / job.name / "checkpoints", ignore_errors=True)

    tasks = [
        asyncio.create_task(one(job)) for job in jobs if "failed" in found.get(job.name, {"failed": "not made yet"})
    ]
    try:
        for done in asyncio.as_completed(tasks):
            job, result = await done
            described = {"variant": job.variant, "seed": job.seed, "config": to_dict(job.config)}
            made = {"corpora": job.corpora.named(), "commit": commit, "dirty": dirty, "cards": sorted({*gpu_names()})}
            found[job.name] = described | made | result
            objects.publish_bytes(str(options.json), f"{json.dumps(found, indent=1)}\n".encode())
            print(table_of([found[job.name]]).splitlines()[2], flush=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> int:
    options = arguments()
    variants = options.variant or [options.recipe.replace(":", "-")]
    return measure(
        options,
        lambda corpora: [job for text in variants for job in variant_jobs(text, options, corpora)],
        lambda results: table(results, options.target),
    )


def measure(options: argparse.Namespace, jobs_on: Callable[[Corpora], list[Job]], table_of: Table) -> int:
    """Train the jobs that the corpora are for, and print their table -> exit status."""
    try:
        if options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: name a file")
        options.json.parent.mkdir(parents=True, exist_ok=True)
        corpora = prepare(options.corpus, options.val, options.split, options.runs)
        jobs = jobs_on(corpora)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print(f"training shards {corpora.train[:12]} ({corpora.train_tokens:,} tokens), ", end="")
    print(f"validation {corpora.val[:12]} ({corpora.val_tokens:,})", flush=True)
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    try:
        asyncio.run(run_all(jobs, options, found, table_of))
    except KeyboardInterrupt:
        sys.stderr.write(f"ended by Ctrl-C: {options.json} has the runs that were whole by then\n")
        return 130
    results = [found[job.name] for job in jobs]
    print(table_of(results))
    return int(any("failed" in result for result in results))


def arguments() -> argparse.Namespace:
    parser = parser_of("time_to_loss", __doc__)
    parser.add_argument("--variant", action="append", help="NAME:key=value,… (recipe=NAME too); one line of the table")
    parser.add_argument("--target", type=float, default=TARGET, help="validation loss")
    return parsed(parser)


def parser_of(name: str, doc: str) -> argparse.ArgumentParser:
    """What every benchmark over trainings takes."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=doc.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="shards or parquet to train on: a file or a folder")
    parser.add_argument("--val", default="", help="the same to validate on; default: the corpus's validation shards")
    parser.add_argument("--split", type=int, default=0, help="validate on the last so many training tokens instead")
    parser.add_argument("--recipe", default="speedrun-124m", help="a name, or modern:d8c512: the speed recipe there")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--micro-batch", type=int, default=64, help="sequences")
    parser.add_argument("--val-every", type=int, default=25, help="steps; finer for the final figure")
    parser.add_argument("--val-tokens", type=int, default=VALIDATED)
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="key=value, for every variant")
    parser.add_argument("--at-once", type=int, default=0, help="runs; default: one a GPU")
    parser.add_argument("--runs", type=Path, default=Path(name), help="folder for the runs")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints: gigabytes a run")
    parser.add_argument("--json", type=Path, default=Path(f"{name}.json"), help="results, also of earlier calls")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1")
    if options.split < 0:
        parser.error(f"--split {options.split} must not be negative")
    if options.val and options.split:
        parser.error("--val is for figures to report, --split for choices: give one of them")
    return options


if __name__ == "__main__":
    sys.exit(main())
