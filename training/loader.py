"""How do shards become batches? Sequences at given positions of the order, as (B, T) tokens and targets."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from storage.shards import open_shard, shard_paths
from training.order import Order, batch


class Loader:
    """Reads memory-mapped shards; holds no position, so there is none to save."""

    def __init__(
        self, paths: Sequence[str], context: int, seed: int, shuffle: bool, device: torch.device
    ) -> None:
        self.shards = [open_shard(path) for path in paths]
        self.order = Order(tuple(map(len, self.shards)), context, seed, shuffle)
        self.device = device

    def __call__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The sequences at `positions` -> tokens and targets, (B, T) int64 each, on the device."""
        T = self.order.context
        rows = [self.shards[shard][at : at + T + 1] for shard, at in batch(self.order, positions)]
        host = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        if self.device.type == "cuda":
            host = host.pin_memory().to(self.device, non_blocking=True)
        return host[:, :-1].contiguous(), host[:, 1:].contiguous()


def training_loader(folder: str, context: int, seed: int, shuffle: bool, device: torch.device) -> Loader:
    """Raises ValueError where `folder` holds no training shards."""
    return Loader(_paths(folder, "train"), context, seed, shuffle, device)


def validation_loader(folder: str, context: int, device: torch.device) -> Loader:
    """The validation split in its own order, the same for every run."""
    return Loader(_paths(folder, "val"), context, 0, False, device)


def _paths(folder: str, split: str) -> list[str]:
    paths = shard_paths(folder, split)  # type: ignore[arg-type]
    if not paths:
        raise ValueError(f"no {split} shards (*_{split}_*.bin) in {folder}: tokenize a corpus into it first")
    return paths
