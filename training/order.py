"""Which tokens does each training step see? A pure function of the shards' sizes, the seed and the position.

Shards are read in order, epoch after epoch; within a shard the sequences of T tokens come in a seeded
permutation. A position counts sequences from the start of the run, so the order is the same for any number
of ranks and any micro-batch. The permutation is computed here rather than by numpy's generators, whose
streams may change between versions.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Order:
    """The order of a corpus's training sequences."""

    shard_tokens: tuple[int, ...]  # tokens in each training shard
    context: int  # T; a sequence takes T + 1 tokens, the last of which is the next sequence's first
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.sequences_per_epoch == 0:
            raise ValueError(
                f"no training shard holds a sequence of {self.context} tokens and its target (shards of "
                f"{list(self.shard_tokens)} tokens): take a larger corpus or set a smaller context"
            )

    @cached_property
    def shard_sequences(self) -> tuple[int, ...]:
        return tuple(max(0, (tokens - 1) // self.context) for tokens in self.shard_tokens)

    @cached_property
    def shard_ends(self) -> tuple[int, ...]:
        """Sequences up to the end of each shard."""
        return tuple(accumulate(self.shard_sequences))

    @property
    def sequences_per_epoch(self) -> int:
        return self.shard_ends[-1] if self.shard_ends else 0

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, sequence within the shard's permutation) of the sequence at `position`."""
        epoch, rest = divmod(position, self.sequences_per_epoch)
        shard = bisect_right(self.shard_ends, rest)
        return epoch, shard, rest - (self.shard_ends[shard - 1] if shard else 0)

    def sequence(self, position: int) -> tuple[int, int]:
        """(shard, offset of its first token) of the sequence at `position`."""
        epoch, shard, index = self.locate(position)
        return shard, int(self.permutation(epoch, shard)[index]) * self.context

    def permutation(self, epoch: int, shard: int) -> NDArray[np.int64]:
        """The order in which an epoch takes a shard's sequences, as indices into the shard."""
        count = self.shard_sequences[shard]
        return _permutation(count, self.seed, epoch, shard) if self.shuffle else _straight(count)


def batch(order: Order, positions: Sequence[int]) -> list[tuple[int, int]]:
    """(shard, offset) of each sequence of a batch."""
    return [order.sequence(position) for position in positions]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int, shard: int) -> NDArray[np.int64]:
    """A shard's sequences in an epoch's order: indices sorted by a hash of (seed, epoch, shard, index)."""
    key = _hash(np.array([seed], dtype=np.int64).view(np.uint64))
    for part in (epoch, shard):
        key = _hash(key ^ np.uint64(part))
    return np.argsort(_hash(key ^ _hash(np.arange(count, dtype=np.uint64))), kind="stable")


@lru_cache(maxsize=4)
def _straight(count: int) -> NDArray[np.int64]:
    return np.arange(count)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = x + _MIX[0]
    x = (x ^ (x >> np.uint64(30))) * _MIX[1]
    x = (x ^ (x >> np.uint64(27))) * _MIX[2]
    return x ^ (x >> np.uint64(31))
