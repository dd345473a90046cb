"""Does training on a GPU do what the CPU tests promise? Equality, resume and memory, a table for each.

    python -m benchmarks.check_training [--data ../shared/data/fineweb_edu_style/sample] [--part cpu resume memory
        small] [--json FILE]

cpu:    20 steps of gpt2-124m at 4,096 tokens: fp32 on the GPU beside fp32 on the CPU and bf16 on the GPU
resume: 200 steps of gpt2-124m, killed at about step 90, ended by SIGTERM at about step 150: equal to the bit?
memory: what `plan` predicts beside what the allocator's peak was, for d12, d24, d36 and d48
small:  three steps of gpt2-1558m under an allocator cap of 22 GiB, without fp32 masters
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from storage import sources
from storage.shards import shard_name, write_shard
from storage.tokenizer import EOT, encode
from training import plan
from training.bench import configure
from training.config import override, to_dict
from training.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
SHARD_TOKENS = 2_000_000
MEMORY_ROWS = (("d12", 64), ("d24", 32), ("d36", 16), ("d48", 16))


def make_tokens(data: str, folder: Path) -> str:
    """Three shards of the corpus's first documents."""
    parts: list[np.ndarray] = []
    files = [str(path) for path in sorted(Path(data).glob("*.parquet"))]
    for batch in sources.documents(files):
        for text in sources.texts(batch):
            parts += [np.array([EOT], dtype=np.uint16), encode(text)]
        if sum(map(len, parts)) >= 3 * SHARD_TOKENS:
            break
    tokens = np.concatenate(parts)
    folder.mkdir()
    for index in range(3):
        name = shard_name("check", "train" if index else "val", index)
        write_shard(str(folder / name), tokens[index * SHARD_TOKENS : (index + 1) * SHARD_TOKENS])
    return str(folder)


def start(run: Path, tokens: str, name: str, settings: list[str], gpu: bool = True) -> subprocess.Popen[bytes]:
    if not (run / "config.json").exists():
        run.mkdir()
        (run / "config.json").write_text(json.dumps(to_dict(override(recipe(name), settings))))
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "training.launch", "--gpus=1", "training.train", str(run), f"--tokens={tokens}"]
    return subprocess.Popen(line, cwd=ROOT, env={**os.environ, **hidden})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare_devices(place: Path, tokens: str) -> dict[str, Any]:
    common = ["steps=20", "batch_tokens=4096", "micro_batch=4", "val_batches=1", "val_sequences=4", "sample_tokens=1"]
    found = {}
    for title, dtype, gpu in (("gpu_fp32", "fp32", True), ("cpu_fp32", "fp32", False), ("gpu_bf16", "bf16", True)):
        settings = [*common, f"train.dtype={dtype}", "warmup_steps=5"]
        assert start(place / title, tokens, "gpt2-124m", settings, gpu).wait() == 0
        found[title] = [line["loss"] for line in lines(place / title)]
    print(f"{'step':>4} {'CPU fp32':>10} {'GPU fp32':>10} {'difference':>11} {'GPU bf16':>10} {'difference':>11}")
    for step, (cpu, gpu, bf16) in enumerate(zip(found["cpu_fp32"], found["gpu_fp32"], found["gpu_bf16"], strict=True)):
        print(f"{step:>4} {cpu:>10.6f} {gpu:>10.6f} {gpu - cpu:>11.1e} {bf16:>10.6f} {bf16 - cpu:>11.1e}")
    return found


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


def run_small(place: Path, tokens: str) -> dict[str, Any]:
    settings = ["steps=3", "batch_tokens=8192", "master_weights=false", "memory_gib=22", "warmup_steps=1"]
    settings += ["val_batches=1", "val_sequences=2", "sample_tokens=1", "health_every=0"]
    status = start(place / "small", tokens, "gpt2-1558m", settings).wait()
    peak = max((line["memory"] for line in lines(place / "small")), default=0) / plan.GIB
    print(f"gpt2-1558m under 22 GiB: exit status {status}, peak {peak:.2f} GiB by the allocator")
    return {"status": status, "peak_gib": peak, "steps": lines(place / "small")}


PARTS = {"cpu": compare_devices, "resume": compare_resume, "memory": compare_memory, "small": run_small}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check training on a GPU.")
    parser.add_argument("--data", default=str(ROOT / "../shared/data/fineweb_edu_style/sample"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = make_tokens(options.data, Path(scratch, "tokens"))
        for name in options.part:
            print(f"\n== {name}", flush=True)
            place = Path(scratch, name)
            place.mkdir()
            found[name] = PARTS[name](place, tokens)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
