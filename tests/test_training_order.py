"""The order of training sequences: each once an epoch, and a function of seed and position alone."""

from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from storage.shards import open_shard, shard_paths
from training.arrival import Arrivals
from training.loader import Loader, training_loader
from training.order import Order, batch

SHARDS = (1000, 40, 517)  # tokens
T = 16


def test_an_epoch_holds_each_sequence_of_each_shard_once_in_shard_order() -> None:
    order = Order(SHARDS, T, seed=1)
    for epoch in range(2):
        start = epoch * order.sequences_per_epoch
        seen = batch(order, range(start, start + order.sequences_per_epoch))
        assert [shard for shard, _ in seen] == [0] * 62 + [1] * 2 + [2] * 32
        for shard, tokens in enumerate(SHARDS):
            offsets = sorted(at for s, at in seen if s == shard)
            assert offsets == list(range(0, tokens - T, T))


def test_without_shuffling_sequences_come_as_they_lie() -> None:
    order = Order(SHARDS, T, seed=1, shuffle=False)
    assert batch(order, range(3)) == [(0, 0), (0, 16), (0, 32)]
    assert order.sequence(order.sequences_per_epoch) == (0, 0)


def test_seed_epoch_and_shard_each_give_another_permutation() -> None:
    def offsets(seed: int, epoch: int) -> list[int]:
        order = Order((1000, 1000), T, seed)
        return [at for _, at in batch(order, range(epoch * 124, epoch * 124 + 124))]

    first = offsets(1, 0)
    assert first[:62] != first[62:] and first != offsets(2, 0) and first != offsets(1, 1)
    assert first == offsets(1, 0)


def test_the_permutation_never_changes_between_versions() -> None:
    """Literal values: a run that is resumed by another version of numpy or of this code must see them too."""
    assert [at // T for _, at in batch(Order((200,), T, seed=42), range(12))] == PERMUTATION


PERMUTATION = [11, 0, 3, 5, 6, 8, 7, 10, 1, 4, 2, 9]


def test_the_permutation_is_even() -> None:
    """Each sequence comes at each place about as often (chi-square over 4,000 seeds, 9 x 9 freedom)."""
    counts = np.zeros((10, 10))
    for seed in range(4000):
        for place, (_, at) in enumerate(batch(Order((161,), T, seed), range(10))):
            counts[place, at // T] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 140  # 99.99th percentile of chi-square with 81


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_a_step_s_sequences_are_the_same_for_any_ranks_and_micro_batch(ranks: int, micro_batch: int) -> None:
    order = Order(SHARDS, T, seed=3)
    micro_steps = 8 // (ranks * micro_batch)
    positions = [
        first + i
        for micro_step in range(micro_steps)
        for rank in range(ranks)
        for first in [(micro_step * ranks + rank) * micro_batch]
        for i in range(micro_batch)
    ]
    assert batch(order, positions) == batch(order, range(8))


def test_a_corpus_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller context"):
        Order((16, 3), T, seed=0)


def test_the_loader_gives_the_tokens_at_those_places_and_their_successors(tmp_path: Path) -> None:
    folder = tiny_run.tokens(tmp_path / "tokens")
    load = training_loader(folder, T, seed=5, shuffle=True, device=torch.device("cpu"))
    tokens, targets = load(range(10, 30))
    shards = [open_shard(path) for path in shard_paths(folder, "train")]
    for row, (shard, at) in enumerate(batch(load.order, range(10, 30))):
        assert tokens[row].tolist() == shards[shard][at : at + T].tolist()
        assert targets[row].tolist() == shards[shard][at + 1 : at + T + 1].tolist()


def test_the_loader_waits_for_shards_still_being_made_and_gives_the_same_batches(tmp_path: Path) -> None:
    whole = tiny_run.tokens(tmp_path / "whole", shards=4)
    everything = training_loader(whole, T, 5, True, torch.device("cpu"))
    first, *later = shard_paths(whole, "train")
    waits: list[int] = []

    class Slow(Arrivals):
        """One shard more each time that the loader waits; the third is the last."""

        def wait(self, shards: int) -> None:
            waits.append(shards)
            self.paths.append(later[shards - 2])
            self.complete = shards == 3

    growing = Loader(Slow(whole, paths=[first]), T, 5, True, torch.device("cpu"))
    for start in range(0, 90, 6):  # into the second epoch
        for found, expected in zip(growing(range(start, start + 6)), everything(range(start, start + 6)), strict=True):
            assert torch.equal(found, expected)
    assert waits == [2, 3]
