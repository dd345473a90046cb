"""How is the model made ready for the machine? In one visible order: weights, shards, recompute, compile."""

import logging
from pathlib import Path

import torch

from training.checkpoint import load_model, load_optimizer
from training.config import RunConfig
from training.distributed import World
from training.gpt2 import GPT2
from training.optim import ShardedAdamW

log = logging.getLogger("gpt2.assemble")


def assemble(config: RunConfig, world: World, checkpoint: Path | None) -> tuple[GPT2, ShardedAdamW]:
    """The model and its optimizer on the rank's device, fresh or as a checkpoint left them."""
    model = _weights(config, checkpoint)
    optimizer = ShardedAdamW(model, config.train, world)
    if checkpoint is not None:
        load_optimizer(checkpoint, optimizer)
    if world.device.type == "cuda":
        for block in model.blocks:
            block.compile()  # block by block: the layers share one graph, compiled in seconds
    return model, optimizer


def _weights(config: RunConfig, checkpoint: Path | None) -> GPT2:
    """The model in fp32 on the CPU."""
    with torch.device("meta"):  # torch's own initialization would be thrown away
        model = GPT2(config.model)
    model.to_empty(device="cpu")
    if checkpoint is not None:
        load_model(checkpoint, model)
    else:
        model.init_weights(config.train.init_seed)
    return model
