"""Are shards what they say they are, down to the documents that they were made from?"""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import objects, parquet, shards, tokenizer

READ_AT_ONCE = 4  # shards


@dataclass(frozen=True)
class Verified:
    shards: int
    tokens: int
    largest_token: int
    documents: int  # that begin in these shards; 0 where there are no indexes
    compared: int  # sampled documents whose tokens decode to their text


def verify(folder: str, sample: int = 50, seed: int = 0) -> Verified:
    """Check headers, lengths and token ids of all shards of a folder, and the text of some documents.

    Raises ValueError naming the shard, or the document, that is wrong. Where the documents' indexes are absent
    (shards that were tokenized elsewhere) only the shards themselves are checked.
    """
    paths = [*shards.shard_paths(folder, "val"), *shards.shard_paths(folder, "train")]
    if not paths:
        raise ValueError(f"{folder} holds no token shards: make them first")
    counts = [shards.read_header(path) for path in paths]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        largest = max(pool.map(shards.check_tokens, paths))
    indexes = [shards.index_name(path) for path in paths]
    indexes = [url for url in indexes if objects.exists(url)]
    documents, chosen = _sample(indexes, sample, seed)
    stream = _Stream(paths, counts)
    for row in chosen:
        _check_document(stream, row, source_url(folder, row["file"]))
    return Verified(len(paths), sum(counts), largest, documents, len(chosen))


def _sample(indexes: list[str], size: int, seed: int) -> tuple[int, list[dict[str, Any]]]:
    """(documents in the indexes, some of their rows in corpus order), with one index in memory at a time."""
    begins = [np.flatnonzero(parquet.read_table(url, ["start"])["start"].to_numpy() >= 0) for url in indexes]
    ends = np.cumsum([0, *map(len, begins)])
    total = int(ends[-1])
    chosen = np.array(sorted(random.Random(seed).sample(range(total), min(size, total))), dtype=np.int64)
    rows: list[dict[str, Any]] = []
    for url, inside, first, last in zip(indexes, begins, ends, ends[1:], strict=False):
        here = chosen[(chosen >= first) & (chosen < last)] - first
        if len(here):
            rows += parquet.read_table(url).take(inside[here]).to_pylist()
    return total, rows


def source_url(folder: str, file: str) -> str:
    """Where the documents' file lies that an index in `folder` names: by its path in the store, or in full."""
    store = objects.absolute(folder).rstrip("/").rsplit("/", 2)[0]  # folder is STORE/tokens/CORPUS
    return objects.within(store, file)


class _Stream:
    """Shards as one run of tokens."""

    def __init__(self, paths: list[str], counts: list[int]):
        self.paths = paths
        self.starts = np.cumsum([0, *counts])

    def read(self, start: int, count: int) -> np.ndarray:
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        read = [shards.read_tokens(self.paths[first], start - int(self.starts[first]), count)]
        while (have := sum(map(len, read))) < count and first + len(read) < len(self.paths):
            read.append(shards.read_tokens(self.paths[first + len(read)], 0, count - have))
        return np.concatenate(read)


def _check_document(stream: _Stream, row: dict[str, Any], url: str) -> None:
    position, count, number = row["position"], row["tokens"], row["row"]
    if not objects.exists(url):
        raise ValueError(f"{url} is not there any more: its tokens can't be compared with its text")
    found = stream.read(position, count)
    if found[0] != tokenizer.EOT or tokenizer.decode(found[1:]) != parquet.texts_at(url, [number])[number]:
        raise ValueError(
            f"the tokens at {position:,} do not decode to row {number} of {url}: the documents have changed since, "
            "or the shard is damaged; make the shards anew"
        )
