"""How do shards become batches? Sequences at given positions of the order, as (B, T) tokens and targets."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from storage.shards import open_shard, shard_paths
from training.arrival import Arrivals
from training.order import Order, batch


class Loader:
    """Reads memory-mapped shards, waiting for those still being made; holds no position, so none is saved."""

    def __init__(self, arrivals: Arrivals, context: int, seed: int, shuffle: bool, device: torch.device) -> None:
        self.arrivals, self.device = arrivals, device
        self.shards: list[np.memmap] = []
        self.order = Order((context + 1,), context, seed, shuffle)
        self._take_in()

    def _take_in(self) -> None:
        """Open the shards that have come; what they hold follows what was there, so no position moves."""
        self.shards += [open_shard(path) for path in self.arrivals.paths[len(self.shards) :]]
        order = self.order
        self.order = Order(tuple(map(len, self.shards)), order.context, order.seed, order.shuffle)

    @property
    def complete(self) -> bool:
        return self.arrivals.complete

    def has(self, sequences: int) -> bool:
        """Whether the first so many sequences of the run are here, or all the shards that there will be."""
        if not self.complete and sequences > self.order.sequences_per_epoch:
            self.arrivals.look()
            self._take_in()
        return self.complete or sequences <= self.order.sequences_per_epoch

    def __call__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The sequences at `positions` -> tokens and targets, (B, T) int64 each, on the device."""
        while not self.arrivals.complete and max(positions) >= self.order.sequences_per_epoch:
            self.arrivals.wait(len(self.shards) + 1)
            self._take_in()
        T = self.order.context
        rows = [self.shards[shard][at : at + T + 1] for shard, at in batch(self.order, positions)]
        host = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        if self.device.type == "cuda":
            host = host.pin_memory().to(self.device, non_blocking=True)
        return host[:, :-1].contiguous(), host[:, 1:].contiguous()


def training_loader(folder: str, context: int, seed: int, shuffle: bool, device: torch.device) -> Loader:
    """Raises ValueError where `folder` holds no training shards."""
    arrivals = Arrivals(folder)
    arrivals.wait(1)
    if not arrivals.paths:
        raise ValueError(f"no train shards (*_train_*.bin) in {folder}: tokenize a corpus into it first")
    return Loader(arrivals, context, seed, shuffle, device)


def validation_loader(folder: str, context: int, device: torch.device) -> Loader:
    """The validation split in its own order, the same for every run. Raises ValueError where there is none."""
    paths = shard_paths(folder, "val")
    if not paths:
        raise ValueError(f"no val shards (*_val_*.bin) in {folder}: tokenize a corpus into it first")
    return Loader(Arrivals(folder, paths=paths, complete=True), context, 0, False, device)
