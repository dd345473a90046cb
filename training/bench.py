"""How fast does this machine train a model? Tokens/s, MFU and memory of whole optimizer steps.

    python -m training.bench RECIPE|d48|modern:d12 [--micro-batch 16] [--batch-tokens 131072] [--steps 10] [--profile]

Random tokens, the trainer's own model and optimizer, clipping included; the median of the steps after a warm-up.
MFU by llm.c's formula. `--profile` adds one step's time by kind of operation.
"""

import argparse
import json
import logging
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from training import distributed
from training.assemble import assemble
from training.config import MachineConfig, RunConfig, TrainConfig
from training.distributed import World
from training.metrics import utilization
from training.model_config import model_from_descriptor
from training.optim import clip_scale
from training.processes import started
from training.recipes import ANY_SIZE, RECIPES, recipe

WARM_UP = 3
KINDS = {  # of kernels, by what their names hold; the first that fits
    "communication": r"nccl",  # on the rank where it takes least: the others' holds their waiting for that one
    "attention": r"flash|fmha|sdpa|cudnn",
    "matmul": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "quantization": r"quantize|column_peaks",  # in fp8, GELU or squared ReLU is part of it
    "LayerNorm and residual": r"norm_forward|norm_backward|layer_norm",
    "rotary queries and keys": r"rotate_",
    "GELU or squared ReLU": r"gelu|relu2",
    "bias gradients": r"sum_columns|add_sums",
    "head's loss": r"cross_entropy|softmax|scale_rows",
    "embeddings": r"embed|add_runs|add_edges|add_positions|[Ss]ort|[Rr]adix",
    "optimizer and clipping": r"_update|_accumulate|_apply|adam|norm|multi_tensor",
}


@dataclass(frozen=True)
class Result:
    model: str
    micro_batch: int
    batch_tokens: int
    fp8: bool
    card: str
    torch: str
    step_ms: float  # the median
    step_ms_all: list[float]
    tokens_per_second: float
    mfu: float | None
    peak_gib: float  # by the allocator
    device_gib: float  # on the card, everything included
    seconds_to_first_step: float
    loss: float
    profile_ms: dict[str, float] | None = None


def configure(name: str, micro_batch: int, batch_tokens: int, fp8: bool = False) -> RunConfig:
    """The run of that recipe, or of a model such as "d48". Raises ValueError for neither."""
    if name in RECIPES or name.startswith(ANY_SIZE):
        config = recipe(name)
    elif re.match(r"d\d|gpt3:", name):
        train = TrainConfig(steps=1000, batch_tokens=131_072, lr=6e-4)
        config = RunConfig(name, "random tokens", model_from_descriptor(name), train)
    else:
        raise ValueError(
            f"{name!r} is no recipe and no model: choose from {', '.join(RECIPES)}, or d12 … d48, or modern:d12"
        )
    train = replace(config.train, batch_tokens=batch_tokens or config.train.batch_tokens, fp8=fp8)
    return replace(config, train=train, machine=MachineConfig(micro_batch=micro_batch))


class Bench:
    """Steps like the trainer's, over the same random tokens each time."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        B, T = config.machine.micro_batch, config.model.context
        self.micro_steps, rest = divmod(config.train.batch_tokens, B * T * world.size)
        if rest:
            unit = f"{world.size} ranks x {B} x {T} tokens"
            raise ValueError(f"batch_tokens={config.train.batch_tokens} is not a multiple of {unit}")
        self.model, self.optimizer = assemble(config, world, None)
        generator = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(0, config.model.vocab, (self.micro_steps, B, T + 1), generator=generator)
        self.tokens = tokens.to(world.device)

    def step(self, number: int) -> float:
        """One optimizer step -> its loss."""
        self.optimizer.zero_gradients()
        total = torch.zeros((), device=self.world.device)
        for i, tokens in enumerate(self.tokens):
            self.optimizer.expect(last_micro_step=i == self.micro_steps - 1)
            loss = self.model(tokens[:, :-1], tokens[:, 1:]) / (self.micro_steps * self.world.size)
            loss.backward()
            total += loss.detach()
        value, squared = self.world.sums([total, self.optimizer.squared_norm()])
        self.optimizer.step(number, self.config.train.lr, clip_scale(self.config.train.clip, squared**0.5))
        return value

    def run(self, steps: int, started: float, profile: bool) -> Result:
        times = []
        for number in range(WARM_UP + steps):
            begin = self.now()
            loss = self.step(number)
            times.append((self.now() - begin) * 1e3)
            if number == 0:
                first = time.time() - started
        cuda = self.world.device.type == "cuda"
        card = torch.cuda.get_device_name() if cuda else "CPU"
        free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
        step_ms = statistics.median(times[WARM_UP:])
        rate = self.config.train.batch_tokens / step_ms * 1e3
        return Result(
            model=self.config.recipe,
            micro_batch=self.config.machine.micro_batch,
            batch_tokens=self.config.train.batch_tokens,
            fp8=self.config.train.fp8,
            card=card,
            torch=torch.__version__,
            step_ms=round(step_ms, 2),
            step_ms_all=[round(t, 2) for t in times],
            tokens_per_second=round(rate),
            mfu=utilization(rate, self.config.model.flops_per_token, self.world.size, card),
            peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
            device_gib=round((total - free) / 2**30, 2),
            seconds_to_first_step=round(first, 1),
            loss=loss,
            profile_ms=self.profile(WARM_UP + steps) if profile else None,
        )

    def now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def profile(self, number: int) -> dict[str, float]:
        """Milliseconds of one step by kind of operation, and the wall time."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        cuda = self.world.device.type == "cuda"
        with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
            begin = self.now()
            self.step(number)
            wall = (self.now() - begin) * 1e3
        totals: dict[str, float] = {}
        for event in recorded.key_averages():
            time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            kind = kind_of(event.key)
            totals[kind] = totals.get(kind, 0.0) + time_us / 1e3
        if self.world.size > 1:
            own, ranks = totals.get("communication", 0.0), range(self.world.size)
            totals["communication"] = min(self.world.sums([own * (rank == self.world.rank) for rank in ranks]))
        begin = self.now()
        self.optimizer.step(number, self.config.train.lr, 1.0)
        alone = (self.now() - begin) * 1e3  # Muon's products are among the matmuls
        ordered = sorted(totals.items(), key=lambda item: -item[1])
        shown = {**dict(ordered), "wall": wall, "the optimizer's step alone": alone}
        return {kind: round(ms, 1) for kind, ms in shown.items()}


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel)), "other")


def describe(result: Result) -> str:
    mfu = "" if result.mfu is None else f", MFU {result.mfu:.1%}"
    lines = [
        f"{result.model}, micro-batch {result.micro_batch}, {result.batch_tokens:,} tokens a step, "
        f"{'fp8' if result.fp8 else 'bf16'} products, {result.card}",
        f"  {result.step_ms:,.1f} ms a step, {result.tokens_per_second:,.0f} tokens/s{mfu}",
        f"  {result.peak_gib:.1f} GiB allocated, {result.device_gib:.1f} GiB of the card in use; "
        f"first step after {result.seconds_to_first_step:.0f} s",
    ]
    profile = result.profile_ms or {}
    for kind, ms in profile.items():
        lines.append(f"  {ms:9.1f} ms  {ms / profile['wall']:6.1%}  {kind}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    started = _process_start()
    parser = argparse.ArgumentParser(prog="training.bench", description="Measure training on this machine.")
    parser.add_argument("model", help="a recipe, or a model such as d48")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences a micro-step")
    parser.add_argument("--batch-tokens", type=int, default=0, help="tokens a step; 0: the recipe's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="time by kind of operation, and its share of a step")
    parser.add_argument("--fp8", action="store_true", help="fp8 operands for the blocks' products")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(argv)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if min(options.micro_batch, options.steps) < 1:
            raise ValueError(f"--micro-batch {options.micro_batch}, --steps {options.steps}: both must be at least 1")
        config = configure(options.model, options.micro_batch, options.batch_tokens, options.fp8)
        world = distributed.join()
        result = Bench(config, world).run(options.steps, started, options.profile)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if world.is_first:
        print(describe(result))
        if options.json:
            options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    distributed.leave()
    return 0


def _process_start() -> float:
    """When this process began, by the clock of time.time()."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + int(started(os.getpid())) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
