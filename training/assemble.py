"""How is a run made ready for the machine? What fits it first; then, in one visible order, weights, shards, kernels,
recompute.
"""

from dataclasses import replace
from pathlib import Path

import torch

from training import plan, recompute
from training.checkpoint import load_model, load_optimizer
from training.config import RunConfig, nearest_multiples
from training.distributed import World
from training.gpt2 import GPT2
from training.kernels import accelerate
from training.models import Model
from training.muon import ShardedMuon
from training.optim import ShardedAdamW
from training.weights import empty_model, load_any


def fitted(config: RunConfig, world: World) -> RunConfig:
    """`config` with the micro-batch and the recompute level that it left open.

    On a GPU the largest micro-batch, and the least recompute, that `plan` says will fit; on a CPU, where larger
    micro-batches bring nothing, at most 16 sequences. Raises ValueError where nothing fits or divides.
    """
    machine = config.machine
    sequences = config.train.batch_tokens // config.model.context
    if sequences % world.size:
        raise ValueError(_nearest(config, "ranks", world.size))
    if machine.micro_batch and sequences % (world.size * machine.micro_batch):
        raise ValueError(_nearest(config, "ranks x micro_batch sequences", world.size * machine.micro_batch))
    if world.device.type == "cpu":
        micro_batch = machine.micro_batch or next(n for n in plan.micro_batches(config, world.size) if n <= 16)
        return replace(config, machine=replace(machine, micro_batch=micro_batch, recompute=max(0, machine.recompute)))
    total = torch.cuda.mem_get_info(world.device)[1] / plan.GIB
    if machine.memory_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, machine.memory_gib / total))
    chosen = plan.fit(config, world.size, plan.limit(config, total))
    if chosen.master_weights != config.train.master_weights:
        raise ValueError(
            f"{config.recipe} fits {machine.memory_gib or total:.1f} GiB only without fp32 master weights, which "
            "changes the numbers: set master_weights=false for stochastic rounding (`gpt2 run` does, and says so)"
        )
    return replace(config, machine=replace(machine, micro_batch=chosen.micro_batch, recompute=chosen.recompute))


def _nearest(config: RunConfig, what: str, value: int) -> str:
    total = config.train.batch_tokens
    near = " and ".join(nearest_multiples(total, value * config.model.context))
    return f"batch_tokens={total} does not divide into {value} {what}: the nearest that do are {near}"


def assemble(config: RunConfig, world: World, checkpoint: Path | None) -> tuple[Model, ShardedAdamW]:
    """The model and its optimizer on the rank's device, fresh or as a checkpoint left them.

    Raises ValueError where `init_from` names a model of other sizes, or fp8 cannot be had.
    """
    model = _weights(config, checkpoint)
    make = ShardedMuon if config.train.optimizer == "muon" else ShardedAdamW
    optimizer = make(model, config.train, world, config.machine.overlap)
    if checkpoint is not None:
        load_optimizer(checkpoint, optimizer)
    level = max(0, config.machine.recompute)
    if not accelerate(model, world.device, level, config.train.fp8, config.machine.gelu_epilogue):
        if isinstance(model, GPT2):
            recompute.apply(model, level)
        if world.device.type == "cuda":
            # The fused kernels fix the order of every sum; PyTorch's do where they are told to.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            for block in model.blocks:
                block.compile()  # block by block: the layers share one graph, compiled in seconds
    return model, optimizer


def _weights(config: RunConfig, checkpoint: Path | None) -> Model:
    """The model in fp32 on the CPU."""
    if checkpoint is None and config.train.init_from:
        return _given(config)
    model = empty_model(config.model)
    if checkpoint is not None:
        load_model(checkpoint, model)
    else:
        model.init_weights(config.train.init_seed)
    return model


def _given(config: RunConfig) -> Model:
    model = load_any(config.train.init_from)
    if model.config != config.model:
        raise ValueError(f"init_from={config.train.init_from} is {model.config}, but the run's is {config.model}")
    return model
