"""Which documents did a training step see, and which steps saw a document?

A pure function of the run's configuration and the shards: the order gives a step's sequences, the shards'
indexes give the documents in them. It holds for runs that read their data straight through, as all do but
those that were rewound past a divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage import objects, shards
from storage.verification import read_table
from training.config import RunConfig
from training.cuts import index_name
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


def documents_of_step(tokens: str, config: RunConfig, step: int) -> list[Seen]:
    """The documents in the batch of `step`, counted from 0 as in main.log, those with most tokens first.

    `tokens` is the folder of the run's shards, local or on S3. Raises ValueError for a step that the run has not,
    and for shards without indexes, which were tokenized elsewhere.
    """
    if not 0 <= step < config.train.steps:
        raise ValueError(f"the run has no step {step}, only 0 to {config.train.steps - 1}")
    names, order = _order(tokens, config)
    per_step = config.train.batch_tokens // config.model.context
    first = 0 if config.train.overfit else step * per_step
    by_shard: dict[int, list[int]] = {}
    for position in range(first, first + per_step):
        shard, offset = order.sequence(position)
        by_shard.setdefault(shard, []).append(offset)
    seen: dict[tuple[str, int], Seen] = {}
    for shard, offsets in by_shard.items():
        index = _index(tokens, names[shard])
        for found in _in_sequences(index, names[shard], offsets, config.model.context):
            known = seen.get((found.file, found.row))
            seen[found.file, found.row] = replace(found, tokens=found.tokens + (known.tokens if known else 0))
    return sorted(seen.values(), key=lambda s: (-s.tokens, s.file, s.row))


def _order(tokens: str, config: RunConfig) -> tuple[list[str], Order]:
    """The names of the training shards and the order of their sequences, from the folder's listing alone."""
    found = [s for s in objects.list_files(tokens, ".bin") if "_train_" in objects.name_of(s.path)]
    counts = tuple((s.bytes - shards.HEADER_BYTES) // 2 for s in found)
    order = Order(counts, config.model.context, config.train.order_seed, config.train.shuffle)
    return [s.path for s in found], order


def _index(tokens: str, shard: str) -> pa.Table:
    url = objects.join(tokens, index_name(shard))
    if not objects.exists(url):
        raise ValueError(f"{shard} has no index of its documents: it was tokenized elsewhere")
    return read_table(url)


def _in_sequences(index: pa.Table, shard: str, offsets: Sequence[int], context: int) -> list[Seen]:
    starts, lengths = index["start"].to_numpy(), index["tokens"].to_numpy()
    found = []
    for offset in offsets:
        low = int(np.searchsorted(starts, offset, side="right")) - 1
        high = int(np.searchsorted(starts, offset + context, side="left"))
        for at, row in enumerate(index.slice(low, high - low).to_pylist(), start=low):
            inside = min(starts[at] + lengths[at], offset + context) - max(starts[at], offset)
            names = {name: row[name] or "" for name in ("id", "url", "dump", "file")}
            found.append(Seen(**names, row=row["row"], shard=shard, tokens=int(inside)))
    return found


def steps_of_document(tokens: str, config: RunConfig, document: str) -> list[int]:
    """The steps of a run, from 0, whose batches hold a token of the document with this id, as input.

    Raises ValueError where no training shard has such a document.
    """
    names, order = _order(tokens, config)
    places = [(n, start, count) for n, name in enumerate(names) for start, count in _places(tokens, name, document)]
    if not places:
        raise ValueError(f"no training shard in {tokens} has a document {document!r}: is it in the validation shard?")
    per_step = config.train.batch_tokens // config.model.context
    sequences = config.train.steps * per_step
    steps = set()
    for shard, start, count in places:
        first = order.shard_ends[shard] - order.shard_sequences[shard]
        for epoch in range(-(-sequences // order.sequences_per_epoch)):
            began = epoch * order.sequences_per_epoch + first
            for position in range(began, min(began + order.shard_sequences[shard], sequences)):
                offset = order.sequence(position)[1]
                if offset < start + count and offset + config.model.context > start:
                    steps.add(position // per_step)
    return sorted(steps)


def _places(tokens: str, shard: str, document: str) -> list[tuple[int, int]]:
    """(start, tokens) of a document in a shard."""
    rows = _index(tokens, shard).filter(pc.field("id") == document)
    return [(row["start"], row["tokens"]) for row in rows.to_pylist()]
