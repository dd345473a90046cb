"""How does training scale over the GPUs of one machine, and do its results stay the same?

    python -m benchmarks.scaling speed|equality|overlap … [--ranks 1 2 4 8] [--tokens FOLDER] [--tiny] [--out FOLDER]

speed:    d12 and d48 at each number of GPUs, the same micro-batch and accumulation on each. GPUs of one kind differ by
          some percent, and all wait for the slowest: so efficiency is told against it too, as it is when each GPU
          trains alone and all do so at once. "in NCCL": the share of a step in which the slowest rank's NCCL kernels
          ran, behind the computation or not
equality: d12 at 131,072 tokens a step: losses on 1 and on all GPUs; a rank killed in mid-step; a checkpoint
          of all GPUs resumed on half of them and on one
overlap:  a step on all GPUs with gradients and weights travelling during the computation, and after it
`--tiny` takes the demo's model and random tokens, on gloo ranks where there is no GPU: that the script works, not how
fast anything is. The folder of `--out` gets scaling_speed.json and so on, each written after every case.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.check_training import children, make_tokens, reached, wait_until
from storage.shards import shard_name, shard_paths, write_shard
from training.config import to_dict
from training.gpus import gpu_count, gpu_ids
from training.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    model: str
    micro_batch: int
    micro_steps: int
    context: int = 1024

    def batch_tokens(self, ranks: int) -> int:
        return self.micro_batch * self.micro_steps * self.context * ranks


CASES = (Case("d12", 64, 8), Case("d48", 16, 8))
TINY = (Case("demo", 1, 2, context=256),)
Keep = Callable[[Any], None]  # what has been found so far, after each case


def alone(case: Case, place: Path) -> list[dict[str, Any]]:
    """One rank on each GPU, all at once -> a result for each GPU; without a GPU one rank."""
    gpus: Sequence[str | None] = gpu_ids() or [None]
    processes = [start_bench(case, 1, place / f"{number}.json", gpu) for number, gpu in enumerate(gpus)]
    assert not any([process.wait() for process in processes])
    return [json.loads((place / f"{number}.json").read_text()) for number in range(len(gpus))]


def together(case: Case, ranks: int, place: Path) -> dict[str, Any]:
    assert start_bench(case, ranks, place / "all.json").wait() == 0
    return json.loads((place / "all.json").read_text())  # type: ignore[no-any-return]


def start_bench(case: Case, ranks: int, file: Path, gpu: str | None = None) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "training.launch", f"--gpus={ranks}", "training.bench", case.model]
    line += [f"--micro-batch={case.micro_batch}", f"--batch-tokens={case.batch_tokens(ranks)}"]
    line += [f"--steps={2 if case in TINY else 6}", "--profile", f"--json={file}"]
    only = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return subprocess.Popen(line, cwd=ROOT, env=os.environ | only)


def speed(place: Path, counts: Sequence[int], cases: Sequence[Case], tokens: str, keep: Keep) -> None:
    found = []
    columns = ("ms a step", "tokens/s", "of GPU 0", "of slowest", "GiB a GPU", "in NCCL")
    print(f"{'model':<6} {'GPUs':>6}" + "".join(f" {column:>10}" for column in columns))
    for case in cases:
        lone = alone(case, place)
        results = [(1, f"{gpu} only", result) for gpu, result in enumerate(lone)]
        results += [(ranks, str(ranks), together(case, ranks, place)) for ranks in counts if ranks > 1]
        for ranks, name, result in results:
            rate, rates = result["tokens_per_second"] / ranks, [one["tokens_per_second"] for one in lone]
            result |= {"ranks": ranks, "gpus": name, "efficiency": rate / rates[0], "of_slowest": rate / min(rates)}
            result["communication"] = result["profile_ms"].get("communication", 0.0) / result["profile_ms"]["wall"]
            print(
                f"{case.model:<6} {name:>6} {result['step_ms']:>10.1f} {result['tokens_per_second']:>10,} "
                f"{result['efficiency']:>10.1%} {result['of_slowest']:>10.1%} {result['peak_gib']:>10.2f} "
                f"{result['communication']:>10.1%}",
                flush=True,
            )
            found.append(result)
        keep(found)


class Runs:
    """Training runs of one configuration on different numbers of ranks."""

    def __init__(self, place: Path, tokens: str, name: str, settings: Sequence[str]) -> None:
        self.place, self.tokens = place, tokens
        quiet = ["val_every=0", "val_batches=1", "val_sequences=8", "sample_tokens=1"]
        self.config = to_dict(recipe(name, [*quiet, "health_every=0", *settings]))

    def start(self, name: str, ranks: int, *options: str) -> subprocess.Popen[bytes]:
        run = self.place / name
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(self.config))
        line = [sys.executable, "-m", "training.launch", f"--gpus={ranks}", *options, "training.train"]
        return subprocess.Popen([*line, str(run), f"--tokens={self.tokens}"], cwd=ROOT)

    def losses(self, name: str) -> list[float]:
        lines = (self.place / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def kill_at(self, name: str, step: int, process: subprocess.Popen[bytes], count: int) -> None:
        """SIGKILL `count` of the ranks as soon as `step` is in the log."""
        wait_until(partial(reached, self.place / name, step), process)
        (agent,) = children(process.pid)
        for rank in children(agent)[-count:]:
            os.kill(rank, signal.SIGKILL)

    def gap(self, name: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(self.losses(name), self.losses(other), strict=True))


def equality(place: Path, counts: Sequence[int], cases: Sequence[Case], tokens: str, keep: Keep) -> None:
    name, batch = ("demo", 1024) if cases is TINY else ("gpt2-124m", 131_072)
    settings = [f"batch_tokens={batch}", "steps=20", "checkpoint_every=5", "keep_checkpoints=9"]
    runs = Runs(place, tokens, name, settings)
    most = max(counts)
    for name, ranks in (("one", 1), ("all", most)):
        assert runs.start(name, ranks).wait() == 0
    killed = runs.start("killed", most, "--restarts=1")
    runs.kill_at("killed", 8, killed, count=1)
    assert killed.wait() == 0
    found: dict[str, Any] = {f"losses on 1 and {most} GPUs": runs.gap("one", "all")}
    found[f"killed and restarted on {most}"] = runs.gap("all", "killed")
    keep(found)
    for ranks in sorted({max(1, most // 2), 1}, reverse=True):
        name = f"on-{ranks}"
        stopped = runs.start(name, most)
        wait_until(partial(reached, place / name, 8), stopped)
        stopped.terminate()
        assert stopped.wait() == 75
        assert runs.start(name, ranks).wait() == 0
        found[f"stopped on {most}, resumed on {ranks}"] = runs.gap("all", name)
        keep(found)
    for what, gap in found.items():
        print(f"{what:<40} largest difference of a step's loss {gap:.1e}")
    found["main.log as undisturbed"] = (place / "killed/main.log").read_bytes() == (place / "all/main.log").read_bytes()
    print(f"main.log after the kill equal to the bit: {found['main.log as undisturbed']}")
    keep(found)


def overlap(place: Path, counts: Sequence[int], cases: Sequence[Case], tokens: str, keep: Keep) -> None:
    """One micro-step a step: communication weighs most where nothing is accumulated."""
    found, most = [], max(counts)
    print(f"{'model':<12} {'GPUs':>4} {'overlap':>8} {'ms a step':>10}")
    for case in cases:
        name = {"d12": "gpt2-124m", "d48": "gpt2-1558m"}.get(case.model, case.model)
        for together in ("true", "false"):
            batch = replace(case, micro_steps=1).batch_tokens(most)
            settings = [f"batch_tokens={batch}", f"micro_batch={case.micro_batch}", f"overlap={together}"]
            runs = Runs(place, tokens, name, [*settings, "steps=13", "checkpoint_every=1000"])
            process = runs.start(f"{name}-{together}", most)
            runs.kill_at(f"{name}-{together}", 11, process, count=most)  # its checkpoint is not wanted
            process.wait()
            lines = (place / f"{name}-{together}/metrics.jsonl").read_text().splitlines()
            ms = statistics.median(json.loads(line)["seconds"] for line in lines[3:]) * 1e3
            print(f"{name:<12} {most:>4} {together:>8} {ms:>10.1f}", flush=True)
            found.append({"model": name, "ranks": most, "overlap": together, "step_ms": ms})
            keep(found)


def shards(place: Path, cases: Sequence[Case], given: str) -> str:
    """The folder of token shards: the one given, or one made below `place`. Raises ValueError where there is none."""
    if given:
        if not all(shard_paths(given, split) for split in ("train", "val")):
            raise ValueError(f"--tokens {given} is no folder of token shards (*_train_*.bin and *_val_*.bin)")
        return given
    if cases is TINY:
        folder = place / "tokens"
        folder.mkdir()
        for index, split in enumerate(("val", "train")):
            tokens = np.random.default_rng(index).integers(0, 50257, 60_000).astype(np.uint16)
            write_shard(str(folder / shard_name("random", split, index)), tokens)
        return str(folder)
    data = os.environ.get("GPT2_SHARED_DATA", str(ROOT / "../shared/data"))
    return make_tokens(f"{data}/fineweb_edu_style/sample", place / "tokens", "token shards with --tokens FOLDER")


PARTS = {"speed": speed, "equality": equality, "overlap": overlap}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description="Measure training on several GPUs.")
    parser.add_argument("part", nargs="+", choices=PARTS)
    parser.add_argument("--ranks", type=int, nargs="+", help="[default: 1, 2, 4 … to all GPUs]")
    parser.add_argument("--tokens", metavar="FOLDER", help="token shards [default: of the texts beside the project]")
    parser.add_argument("--tiny", action="store_true", help="the demo's model, to try the script")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the figures there")
    options = parser.parse_args(argv)
    counts = options.ranks or [2**n for n in range(gpu_count().bit_length())] or [1]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        cases = TINY if options.tiny else CASES
        try:  # first: it may be what a later part lacks
            tokens = "" if options.part == ["speed"] else shards(Path(scratch), cases, options.tokens or "")
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for part in options.part:
            place = Path(scratch, part)
            place.mkdir()
            PARTS[part](place, counts, cases, tokens, partial(write, part, options.out))
    return 0


def write(part: str, out: Path | None, found: Any) -> None:
    if out:
        (out / f"scaling_{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
