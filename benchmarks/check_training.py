"""Does training on a GPU do what the CPU tests promise? Equality, resume and memory, a table for each.

    python -m benchmarks.check_training [--data ../shared/data/fineweb_edu_style/sample]
        [--part losses resume memory small | cpu] [--json FILE]

losses: 20 steps of gpt2-124m at 4,096 tokens: fp32 and bf16 on the GPU beside fp32 on a CPU, and all of them
        beside fp64 on the GPU (plain PyTorch, torch.optim.AdamW). With the recipe's schedule, and with a warm-up
        of 5 steps, at whose rates rounding grows
cpu:    the CPU's part of `losses`, written to check_training_cpu.json, which `losses` reads: it takes minutes
resume: 200 steps of gpt2-124m, killed at about step 90, ended by SIGTERM at about step 150: equal to the bit?
memory: what `plan` predicts beside what the allocator's peak was, for d12, d24, d36 and d48
small:  four steps of gpt2-1558m under an allocator cap of 22 GiB: the plan of a 24 GB card, without a flag
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.token_corpora import encode
from storage.shards import shard_name, write_shard
from training import plan
from training.bench import configure
from training.config import RunConfig, TrainConfig, to_dict
from training.gpt2 import GPT2
from training.loader import training_loader
from training.recipes import recipe
from training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
CPU_LOSSES = Path(__file__).with_name("check_training_cpu.json")
SHARD_TOKENS = 2_000_000
MEMORY_ROWS = (("d12", 64), ("d24", 32), ("d36", 16), ("d48", 16))


def make_tokens(data: str, folder: Path, instead: str) -> str:
    """Three shards of the corpus's first documents. Raises ValueError where it has none: `instead` is to be given."""
    files = sorted(map(str, Path(data).glob("*.parquet")))
    if not files:
        raise ValueError(f"{data} holds no parquet files to train on: give {instead}")
    tokens = encode(files, 3 * SHARD_TOKENS)
    folder.mkdir()
    for index in range(3):
        name = shard_name("check", "train" if index else "val", index)
        write_shard(str(folder / name), tokens[index * SHARD_TOKENS : (index + 1) * SHARD_TOKENS])
    return str(folder)


def start(run: Path, tokens: str, name: str, settings: list[str], gpu: bool = True) -> subprocess.Popen[bytes]:
    return start_run(run, tokens, recipe(name, settings), gpu)


def start_run(run: Path, tokens: str, config: RunConfig, gpu: bool = True) -> subprocess.Popen[bytes]:
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "training.launch", "--gpus=1", "training.train", str(run), f"--tokens={tokens}"]
    return subprocess.Popen(line, cwd=ROOT, env={**os.environ, **hidden})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


STEPS, BATCH, MICRO_BATCH = 20, 4096, 4
WARM_UPS = (700, 5)  # the recipe's; and one so short that the rate is at its highest within the 20 steps


def loss_settings(warm_up: int, dtype: str) -> list[str]:
    common = [f"steps={STEPS}", f"batch_tokens={BATCH}", f"micro_batch={MICRO_BATCH}", "health_every=0"]
    common += ["val_batches=1", "val_sequences=4", "sample_tokens=1"]
    return [*common, f"train.dtype={dtype}", f"warmup_steps={warm_up}"]


def trained_losses(place: Path, tokens: str, warm_up: int, dtype: str, gpu: bool) -> list[float]:
    """The trainer's, in a process of its own."""
    run = place / f"{'gpu' if gpu else 'cpu'}-{dtype}-{warm_up}"
    assert start(run, tokens, "gpt2-124m", loss_settings(warm_up, dtype), gpu).wait() == 0
    return [line["loss"] for line in lines(run)]


def exact_losses(tokens: str, warm_up: int, device: torch.device) -> list[float]:
    """In fp64: the model's plain modules, torch's cross-entropy and torch.optim.AdamW, a sequence at a time."""
    config = recipe("gpt2-124m", loss_settings(warm_up, "fp32"))
    train, sequences = config.train, config.train.batch_tokens // config.model.context
    model = GPT2(config.model)
    model.init_weights(train.init_seed)
    model.to(device, torch.float64)
    optimizer = torch_adamw(model, train)
    load = training_loader(tokens, config.model.context, train.order_seed, train.shuffle, device)
    found = []
    for step in range(train.steps):
        optimizer.zero_grad()
        total = 0.0
        for position in range(step * sequences, (step + 1) * sequences):
            text, targets = load([position])
            loss = F.cross_entropy(model.logits(text).flatten(0, 1), targets.flatten()) / sequences
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, train.clip / norm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()
        found.append(total)
    return found


def torch_adamw(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps)


def tokens_digest(tokens: str) -> str:
    return hashlib.sha256(Path(tokens, shard_name("check", "train", 1)).read_bytes()).hexdigest()


def losses_on_a_cpu(place: Path, tokens: str) -> dict[str, Any]:
    """Written down with the tokens they are of, the torch and the threads that made them."""
    found: dict[str, Any] = {"tokens_sha256": tokens_digest(tokens)}
    for warm_up in WARM_UPS:
        made = {"torch": torch.__version__, "threads": len(os.sched_getaffinity(0))}
        found[f"warmup_{warm_up}"] = {**made, "losses": trained_losses(place, tokens, warm_up, "fp32", gpu=False)}
    CPU_LOSSES.write_text(json.dumps(found, indent=1) + "\n")
    return found


def compare_losses(place: Path, tokens: str) -> dict[str, Any]:
    stored = json.loads(CPU_LOSSES.read_text()) if CPU_LOSSES.exists() else {}
    if stored.get("tokens_sha256") != tokens_digest(tokens):
        stored = losses_on_a_cpu(place, tokens)
    found: dict[str, Any] = {}
    for warm_up in WARM_UPS:
        on_cpu = stored[f"warmup_{warm_up}"]
        print(f"fp32 on a CPU: torch {on_cpu['torch']}, {on_cpu['threads']} threads")
        columns = {"cpu_fp32": on_cpu["losses"]}
        columns["gpu_fp32"] = trained_losses(place, tokens, warm_up, "fp32", gpu=True)
        if warm_up == WARM_UPS[0]:
            columns["gpu_bf16"] = trained_losses(place, tokens, warm_up, "bf16", gpu=True)
        columns["fp64"] = exact_losses(tokens, warm_up, torch.device("cuda"))
        torch.cuda.empty_cache()
        found[f"warmup_{warm_up}"] = columns
        print_losses(warm_up, columns)
    return found


def print_losses(warm_up: int, columns: dict[str, list[float]]) -> None:
    print(f"\nwarm-up of {warm_up} steps\nstep " + " ".join(f"{name:>10}" for name in columns))
    for step, values in enumerate(zip(*columns.values(), strict=True)):
        print(f"{step:>4} " + " ".join(f"{value:>10.6f}" for value in values))
    pairs = [("gpu_fp32", "cpu_fp32"), ("cpu_fp32", "fp64"), ("gpu_fp32", "fp64"), ("gpu_bf16", "cpu_fp32")]
    for one, other in ((a, b) for a, b in pairs if a in columns):
        gap = max(abs(a - b) for a, b in zip(columns[one], columns[other], strict=True))
        print(f"largest difference of a step's loss, {one} from {other}: {gap:.1e}", flush=True)


def compare_resume(place: Path, tokens: str) -> dict[str, Any]:
    settings = ["steps=200", "batch_tokens=65536", "micro_batch=16", "warmup_steps=20", "checkpoint_every=40"]
    settings += ["val_every=50", "val_batches=1", "val_sequences=64", "sample_tokens=16", "keep_checkpoints=9"]
    whole, parts = place / "whole", place / "parts"
    assert start(whole, tokens, "gpt2-124m", settings).wait() == 0
    for step, number in ((90, signal.SIGKILL), (150, signal.SIGTERM)):
        process = start(parts, tokens, "gpt2-124m", settings)
        wait_until(partial(reached, parts, step), process)
        target = ranks(process.pid) if number == signal.SIGKILL else [process.pid]
        for pid in target:
            os.kill(pid, number)
        print(f"{number.name} at step {step}: exit status {process.wait()}")
    assert start(parts, tokens, "gpt2-124m", settings).wait() == 0
    files = sorted((whole / "checkpoints/step_000200").glob("*.safetensors"))
    equal = {f.name: f.read_bytes() == (parts / "checkpoints/step_000200" / f.name).read_bytes() for f in files}
    equal["main.log"] = (whole / "main.log").read_bytes() == (parts / "main.log").read_bytes()
    for name, same in equal.items():
        print(f"{name:<40} {'equal to the bit' if same else 'DIFFERENT'}")
    return equal


def reached(run: Path, step: int) -> bool:
    log = run / "main.log"
    return log.exists() and f"s:{step} trl" in log.read_text()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not ready():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.02)


def ranks(launcher: int) -> list[int]:
    (agent,) = children(launcher)
    return children(agent)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def compare_memory(place: Path, tokens: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(f"{'model':<6} {'micro-batch':>11} {'recompute':>9} {'predicted GiB':>14} {'measured GiB':>13} {'error':>7}")
    for model, micro_batch in MEMORY_ROWS:
        file = place / f"{model}.json"
        batch = micro_batch * 1024 * 2
        line = [sys.executable, "-m", "training.bench", model, f"--micro-batch={micro_batch}", "--steps=2"]
        subprocess.run([*line, f"--batch-tokens={batch}", f"--json={file}"], cwd=ROOT, check=True)
        measured = json.loads(file.read_text())["peak_gib"]
        by_line = plan.memory(configure(model, micro_batch, batch), 1, micro_batch, 0)
        predicted = (sum(by_line.values()) - by_line["CUDA"]) / plan.GIB  # the allocator does not see CUDA's
        error = predicted / measured - 1
        print(f"{model:<6} {micro_batch:>11} {0:>9} {predicted:>14.2f} {measured:>13.2f} {error:>7.1%}", flush=True)
        found[model] = {"micro_batch": micro_batch, "predicted": predicted, "measured": measured, "lines": by_line}
    return found


SMALL_GIB = 22.0


def run_small(place: Path, tokens: str) -> dict[str, Any]:
    """What `gpt2 run gpt2-1558m` does where the card has no more: plan, give up the masters, train."""
    settings = ["steps=4", "batch_tokens=131072", f"memory_gib={SMALL_GIB}"]
    settings += ["val_every=0", "val_batches=1", "val_sequences=2", "sample_tokens=1", "health_every=2"]
    config = plan.settle(recipe("gpt2-1558m", settings), 1, SMALL_GIB)
    fitted = plan.fit(config, 1, SMALL_GIB)
    status = start_run(place / "small", tokens, config).wait()
    steps = lines(place / "small")
    seconds = statistics.median(line["seconds"] for line in steps[1:])
    found = {
        "status": status,
        "master_weights": fitted.master_weights,
        "micro_batch": fitted.micro_batch,
        "recompute": fitted.recompute,
        "predicted_gib": (fitted.total - fitted.memory["CUDA"]) / plan.GIB,  # the allocator does not see CUDA's
        "peak_gib": max(line["memory"] for line in steps) / plan.GIB,
        "seconds_a_step": seconds,
        "tokens_per_second": config.train.batch_tokens / seconds,
        "losses": [line["loss"] for line in steps],
        "save_seconds": [line["save_seconds"] for line in steps],
    }
    print(f"gpt2-1558m under an allocator cap of {SMALL_GIB:.0f} GiB")
    for name, value in found.items():
        print(f"{name:<20} {value}", flush=True)
    return found


PARTS = {
    "losses": compare_losses,
    "cpu": losses_on_a_cpu,
    "resume": compare_resume,
    "memory": compare_memory,
    "small": run_small,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.check_training", description="Check training on a GPU.")
    parser.add_argument("--data", default=str(ROOT / "../shared/data/fineweb_edu_style/sample"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "cpu"])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    found = {}
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokens = make_tokens(options.data, Path(scratch, "tokens"), "a folder of them with --data FOLDER")
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for name in options.part:
            print(f"\n== {name}", flush=True)
            place = Path(scratch, name)
            place.mkdir()
            found[name] = PARTS[name](place, tokens)
            if options.json:  # after each part: what has been measured stays
                Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
