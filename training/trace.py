"""Which documents did a training step see, and which steps saw a document?

A pure function of the run's configuration and the shards: the order gives a step's sequences, the shards'
indexes give the documents in them. A run that was rewound past a divergence left data out; its metrics say
where in the order each of its steps began.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from storage import objects, parquet, shards
from storage.shards import index_name
from training.config import RunConfig
from training.order import Order


@dataclass(frozen=True)
class Seen:
    """A document in a batch."""

    id: str
    url: str
    dump: str
    file: str
    row: int
    shard: str
    tokens: int  # of it in the batch, as inputs


Positions = Mapping[int, int]  # step → its first sequence's place in the order
STRAIGHT: Positions = MappingProxyType({})  # of a run that left nothing out


def positions_of(run: str) -> Positions:
    """Where each step of a run began, from the metrics in its folder."""
    lines = objects.read_text(objects.join(run, "metrics.jsonl")).splitlines()
    return {step["step"]: step["position"] for step in map(json.loads, lines)}


def documents_of_step(tokens: str, config: RunConfig, step: int, positions: Positions = STRAIGHT) -> list[Seen]:
    """The documents in the batch of `step`, counted from 0 as in main.log, those with most tokens first.

    `tokens` is the folder of the run's shards, local or on S3. Raises ValueError for a step that the run has not,
    and for shards without indexes, which were tokenized elsewhere.
    """
    if not 0 <= step < config.train.steps:
        raise ValueError(f"the run has no step {step}, only 0 to {config.train.steps - 1}")
    names, order = _order(tokens, config)
    per_step = _per_step(config)
    first = 0 if config.train.overfit else positions.get(step, step * per_step)
    by_shard: dict[int, list[int]] = {}
    for position in range(first, first + per_step):
        shard, offset = order.sequence(position)
        by_shard.setdefault(shard, []).append(offset)
    found = [_in_sequences(tokens, names[shard], offsets, config) for shard, offsets in by_shard.items()]
    merged: dict[tuple[str, int], Seen] = {}
    for seen in (seen for part in found for seen in part):
        known = merged.get((seen.file, seen.row))
        merged[seen.file, seen.row] = replace(seen, tokens=seen.tokens + (known.tokens if known else 0))
    return sorted(merged.values(), key=lambda s: (-s.tokens, s.file, s.row))


def _per_step(config: RunConfig) -> int:
    return config.train.batch_tokens // config.model.context


def _order(tokens: str, config: RunConfig) -> tuple[list[str], Order]:
    """The names of the training shards and the order of their sequences, from the folder's listing alone."""
    found = [s for s in objects.list_files(tokens, ".bin") if shards.is_of(s.path, "train")]
    counts = tuple((s.bytes - shards.HEADER_BYTES) // 2 for s in found)
    order = Order(counts, config.model.context, config.train.order_seed, config.train.shuffle)
    return [s.path for s in found], order


def _in_sequences(tokens: str, shard: str, offsets: Sequence[int], config: RunConfig) -> list[Seen]:
    """The documents in sequences of a shard, each once, with their tokens in these."""
    url, context = objects.join(tokens, index_name(shard)), config.model.context
    if not objects.exists(url):
        raise ValueError(f"{shard} has no index of its documents: it was tokenized elsewhere")
    index = parquet.read_table(url)
    starts, lengths = _numbers(index, "start"), _numbers(index, "tokens")
    inside: dict[int, int] = {}  # row of the index → tokens
    for offset in offsets:
        low = int(np.searchsorted(starts, offset, side="right")) - 1
        high = int(np.searchsorted(starts, offset + context, side="left"))
        for at in range(low, high):
            count = min(starts[at] + lengths[at], offset + context) - max(starts[at], offset)
            inside[at] = inside.get(at, 0) + int(count)
    chosen = np.array([*inside], dtype=np.int64)
    rows = index.take(pa.Array.from_buffers(pa.int64(), len(chosen), [None, pa.py_buffer(chosen)])).to_pylist()
    texts = ("id", "url", "dump", "file")
    return [
        Seen(**{name: row[name] or "" for name in texts}, row=row["row"], shard=shard, tokens=count)
        for row, count in zip(rows, inside.values(), strict=True)
    ]


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as numpy sees it. As above, by a way that does not load pandas, which takes longer than all else."""
    return np.from_dlpack(table[column].combine_chunks())


def steps_of_places(
    tokens: str, config: RunConfig, places: Iterable[tuple[str, int, int]], positions: Positions = STRAIGHT
) -> list[int]:
    """The steps of a run, from 0, whose batches hold one of these places' tokens as input; empty where none does.

    A place is (training shard, first token in it, tokens); others are passed over.
    """
    names, order = _order(tokens, config)
    per_step = _per_step(config)
    sequences = per_step if config.train.overfit else config.train.steps * per_step
    end = max([sequences, *(position + per_step for position in positions.values())])  # some data may be left out
    held = [_positions(order, names.index(s), start, count, end) for s, start, count in places if s in names]
    found = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *held]))
    if config.train.overfit:
        return [*range(config.train.steps)] if len(found) else []
    if not positions:
        return [int(step) for step in np.unique(found // per_step)]
    began = np.array([*positions.values()])
    seen = np.searchsorted(found, began + per_step) > np.searchsorted(found, began)
    return [step for step, is_seen in zip(positions, seen, strict=True) if is_seen]


def _positions(order: Order, shard: int, start: int, count: int, end: int) -> np.ndarray:
    """Positions before `end` of the sequences that hold one of `count` tokens from `start` of a shard."""
    have = order.shard_sequences[shard]
    indices = np.arange(max(0, start) // order.context, min(-(-(start + count) // order.context), have))
    first = order.shard_ends[shard] - have
    found = [np.zeros(0, dtype=np.int64)]
    for epoch in range(-(-end // order.sequences_per_epoch)):
        places = np.flatnonzero(np.isin(order.permutation(epoch, shard), indices))
        found.append(epoch * order.sequences_per_epoch + first + places)
    every = np.concatenate(found)
    return every[every < end]
