"""Is our sharded optimizer step as fast, and as small, as what PyTorch keeps: DDP, ZeRO's optimizer, FSDP2?

    python -m benchmarks.against_fsdp [--gpus N] [--model d12|d48|…] [--micro-batch B] [--micro-steps M] [--json FILE]

The same model, tokens and steps on N ranks, each way in processes of its own, one after the other and all of them
again: milliseconds a step (the median, of the faster round), processor time a step over all ranks (which other
programs on the machine disturb less), peak memory a rank, and the loss after the steps, which must be the same.
NCCL with bf16 on GPUs, gloo with fp32 on CPUs. All but the last run the same plain modules (on a GPU compiled block
by block):

ours:      training/optim.py, AdamW sharded over the ranks
ddp:       DistributedDataParallel, torch's fused AdamW on every rank
ddp-zero:  the same with ZeroRedundancyOptimizer
fsdp2:     fully_shard a block and the rest; weights are gathered once a step, as ours are
ours-fused: ours with the fused kernels, as training runs on a GPU
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from training import distributed, kernels
from training.config import TrainConfig
from training.distributed import World
from training.gpt2 import GPT2
from training.gpus import ranks_here
from training.kernels_head import head_loss
from training.model_config import ModelConfig, model_from_descriptor
from training.optim import ShardedAdamW

ROOT = Path(__file__).resolve().parents[1]
SMALL = ModelConfig(layers=6, channels=192, heads=3, context=128)  # for CPUs
WARM_UP = 2  # steps
LR = 1e-4


@dataclass(frozen=True)
class Setting:
    model: ModelConfig
    micro_batch: int
    micro_steps: int
    steps: int


@dataclass(frozen=True)
class Result:
    way: str
    ranks: int
    step_ms: float
    cpu_ms: float  # over all ranks
    peak_mib: float  # of the rank that takes most: the allocator's on a GPU, else the process's above its start
    loss: float


Step = Callable[[], Tensor]


def ours(model: GPT2, setting: Setting, world: World, batches: list[Tensor], fused: bool = False) -> Step:
    cuda = world.device.type == "cuda"
    config = TrainConfig(steps=setting.steps, batch_tokens=1, lr=LR, dtype="bf16" if cuda else "fp32")
    optimizer = ShardedAdamW(model, config, world)
    if fused:
        assert kernels.accelerate(model, world.device), "the fused kernels need a GPU and Triton"
    else:
        prepare(model, world)
    taken = iter(range(10**6))

    def step() -> Tensor:
        optimizer.zero_gradients()
        total = torch.zeros((), device=world.device)
        for i, tokens in enumerate(batches):
            optimizer.expect(last_micro_step=i == len(batches) - 1)
            loss = model(tokens[:, :-1], tokens[:, 1:]) / (len(batches) * world.size)
            loss.backward()
            total += loss.detach()
        value, squared = world.sums([total, optimizer.squared_norm()])
        optimizer.step(next(taken), LR, min(1.0, 1.0 / squared**0.5))
        return torch.tensor(value)

    return step


class Autocast(nn.Module):
    """The model's loss from fp32 weights, computed in bf16 on a GPU: autocast would leave the head's input in fp32."""

    def __init__(self, model: GPT2, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = self.model.hidden(tokens).flatten(0, 1)
        weight = self.model.wte.weight.to(self.dtype)
        return head_loss(x.to(self.dtype), weight, targets.flatten(), self.model.config.vocab)


def ddp(model: GPT2, setting: Setting, world: World, batches: list[Tensor], zero: bool = False) -> Step:
    model.to(world.device)
    prepare(model, world)
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    wrapped = DistributedDataParallel(Autocast(model, dtype), gradient_as_bucket_view=True)
    if zero:
        options: dict[str, Any] = {"optimizer_class": torch.optim.AdamW, "parameters_as_bucket_view": False}
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(model.parameters(), **options, **adamw())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **adamw())

    def backward(tokens: Tensor, last: bool) -> Tensor:
        with contextlib.nullcontext() if last else wrapped.no_sync():
            loss = wrapped(tokens[:, :-1], tokens[:, 1:]) / len(batches)
            loss.backward()
        return loss.detach()

    return partial(whole_step, model, optimizer, batches, world, backward)


def fsdp2(model: GPT2, setting: Setting, world: World, batches: list[Tensor]) -> Step:
    model.to(world.device)
    prepare(model, world)
    bf16 = torch.bfloat16 if world.device.type == "cuda" else None
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=bf16), "reshard_after_forward": False}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw())

    def backward(tokens: Tensor, last: bool) -> Tensor:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        model.set_reshard_after_backward(last)  # type: ignore[operator]
        loss = model(tokens[:, :-1], tokens[:, 1:]) / len(batches)
        loss.backward()
        return loss.detach()

    return partial(whole_step, model, optimizer, batches, world, backward)


def whole_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    world: World,
    backward: Callable[[Tensor, bool], Tensor],
) -> Tensor:
    """A step of PyTorch's ways: `backward` takes a micro-batch, and whether it is the last, and gives its loss."""
    optimizer.zero_grad()
    total = torch.zeros((), device=world.device)
    for i, tokens in enumerate(batches):
        total += backward(tokens, i == len(batches) - 1)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return torch.tensor(world.sums([total])[0] / world.size)


def adamw() -> dict[str, Any]:
    return {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def prepare(model: GPT2, world: World) -> None:
    if world.device.type == "cuda":
        for block in model.blocks:
            block.compile()


WAYS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "ddp": ddp,
    "ddp-zero": lambda *given: ddp(*given, zero=True),
    "fsdp2": fsdp2,
    "ours-fused": lambda *given: ours(*given, fused=True),
}


def measure(way: str, setting: Setting, world: World) -> Result:
    """Of this rank among the others."""
    base = resident_mib()
    model = GPT2(setting.model)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(world.rank)
    shape = (setting.micro_steps, setting.micro_batch, setting.model.context + 1)
    batches = list(torch.randint(0, setting.model.vocab, shape, generator=generator).to(world.device))
    step = WAYS[way](model, setting, world, batches)
    times, busy = [], 0.0
    for number in range(WARM_UP + setting.steps):
        if number == WARM_UP:
            busy = time.process_time()
        begin = time.perf_counter()
        loss = float(step())
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    busy = (time.process_time() - busy) / setting.steps * 1e3
    cuda = world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_mib("VmHWM") - base
    most = max(gathered(world, peak))
    cpu_ms = world.sums([busy])[0]
    return Result(way, world.size, statistics.median(times[WARM_UP:]) * 1e3, cpu_ms, most, loss)


def gathered(world: World, value: float) -> list[float]:
    return world.sums([value if rank == world.rank else 0.0 for rank in range(world.size)])


def resident_mib(line: str = "VmRSS") -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(line)) / 1024


def worker(way: str, setting: Setting, file: str) -> None:
    world = distributed.join()
    result = measure(way, setting, world)
    if world.is_first:
        Path(file).write_text(json.dumps(asdict(result)))
    distributed.leave()


def compare(ways: Sequence[str], ranks: int, count: int, arguments: Sequence[str]) -> list[Result]:
    rounds = [[run(way, ranks, arguments) for way in ways] for _ in range(count)]
    found = [min(results, key=lambda r: r.step_ms) for results in zip(*rounds, strict=True)]
    first = found[0]
    print(f"{'way':<11} {'ranks':>5} {'ms a step':>10} {'of ours':>8} {'CPU ms':>9} {'of ours':>8}", end=" ")
    print(f"{'MiB a rank':>11} {'of ours':>8} {'loss':>9}")
    for r in found:
        numbers = (
            f"{r.step_ms:>10.1f} {r.step_ms / first.step_ms:>8.2f} {r.cpu_ms:>9.1f} {r.cpu_ms / first.cpu_ms:>8.2f}"
        )
        memory = f"{r.peak_mib:>11,.0f} {r.peak_mib / first.peak_mib:>8.2f}"
        print(f"{r.way:<11} {ranks:>5} {numbers} {memory} {r.loss:>9.4f}", flush=True)
    return found


def run(way: str, ranks: int, arguments: Sequence[str]) -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/result.json"
        line = [sys.executable, "-m", "training.launch", f"--gpus={ranks}", "benchmarks.against_fsdp"]
        subprocess.run([*line, *arguments, f"--way={way}", f"--out={file}"], cwd=ROOT, check=True)
        result = Result(**json.loads(Path(file).read_text()))
        print(f"  {way}: {result.step_ms:.1f} ms a step, {result.peak_mib:,.0f} MiB", flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our step with PyTorch's.")
    parser.add_argument("--gpus", type=int, default=0, help="ranks [default: every GPU, or 2 on a CPU]")
    parser.add_argument("--model", default="", help="such as d12 [default: d12, or a small one on a CPU]")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--out", help=argparse.SUPPRESS)
    o = parser.parse_args()
    cuda = torch.cuda.is_available()
    model = model_from_descriptor(o.model or "d12") if o.model or cuda else SMALL
    setting = Setting(model, o.micro_batch, o.micro_steps, o.steps)
    if o.way:
        worker(o.way, setting, o.out)
        return
    arguments = [f"--micro-batch={o.micro_batch}", f"--micro-steps={o.micro_steps}", f"--steps={o.steps}"]
    arguments += [f"--model={o.model}"] if o.model else []
    ranks = o.gpus or (ranks_here(0) if cuda else 2)
    found = compare(o.ways or [way for way in WAYS if cuda or way != "ours-fused"], ranks, o.rounds, arguments)
    if o.json:
        figures = {"torch": torch.__version__, "model": asdict(setting), "results": [asdict(r) for r in found]}
        figures["device"] = torch.cuda.get_device_name() if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores"
        Path(o.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
