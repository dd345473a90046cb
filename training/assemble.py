"""How is the model made ready for the machine? In one visible order: weights, shards, kernels, recompute."""

from pathlib import Path

import torch

from training import recompute
from training.checkpoint import load_model, load_optimizer
from training.config import RunConfig
from training.distributed import World
from training.gpt2 import GPT2
from training.kernels import accelerate
from training.models import Model
from training.muon import ShardedMuon
from training.optim import ShardedAdamW
from training.weights import empty_model, load_any


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
