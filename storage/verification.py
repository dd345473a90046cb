"""Are shards what they say they are, down to the documents that they were made from?"""

import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects, shards, sources, tokenizer


@dataclass(frozen=True)
class Verified:
    shards: int
    tokens: int
    largest_token: int
    documents: int  # that begin in these shards; 0 where there are no indexes
    compared: int  # sampled documents whose tokens decode to their text


def verify(folder: str, sample: int = 50, seed: int = 0) -> Verified:
    """Check headers, lengths and token ids of all shards of a local folder, and the text of some documents.

    Raises ValueError naming the shard, or the document, that is wrong. Where the documents' indexes are absent
    (shards that were tokenized elsewhere) only the shards themselves are checked.
    """
    paths = [*shards.shard_paths(folder, "val"), *shards.shard_paths(folder, "train")]
    if not paths:
        raise ValueError(f"{folder} holds no token shards: make them first")
    largest = max(shards.check_tokens(path) for path in paths)
    tokens = [shards.open_shard(path) for path in paths]
    indexes = [path.removesuffix(".bin") + ".documents.parquet" for path in paths]
    indexes = [url for url in indexes if objects.exists(url)]
    rows = pa.concat_tables(map(read_table, indexes)).to_pylist() if indexes else []
    rows = [row for row in rows if row["start"] >= 0]
    chosen = random.Random(seed).sample(rows, min(sample, len(rows)))
    stream = _Stream(tokens)
    for row in sorted(chosen, key=lambda r: r["position"]):
        _check_document(stream, row)
    return Verified(len(paths), sum(map(len, tokens)), largest, len(rows), len(chosen))


def read_table(url: str) -> pa.Table:
    with objects.open_file(url) as f:
        return pq.ParquetFile(f).read(use_threads=False)


class _Stream:
    """Shards as one run of tokens."""

    def __init__(self, parts: list[np.memmap]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def read(self, start: int, count: int) -> np.ndarray:
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        read = [self.parts[first][start - self.starts[first] :][:count]]
        while (have := sum(map(len, read))) < count and first + len(read) < len(self.parts):
            read.append(self.parts[first + len(read)][: count - have])
        return np.concatenate(read)


def _check_document(stream: _Stream, row: dict[str, object]) -> None:
    position, count, url, number = row["position"], row["tokens"], row["file"], row["row"]
    assert isinstance(position, int) and isinstance(count, int) and isinstance(url, str)
    assert isinstance(number, int)
    if not objects.exists(url):
        raise ValueError(f"{url} is not there any more: its tokens can't be compared with its text")
    found = stream.read(position, count)
    if found[0] != tokenizer.EOT or tokenizer.decode(found[1:]) != document_text(url, number):
        raise ValueError(
            f"the tokens at {position:,} do not decode to row {number} of {url}: the documents have changed since, "
            "or the shard is damaged; make the shards anew"
        )


def document_text(url: str, row: int) -> str:
    """The text of one row of a parquet file, reading only its row group."""
    metadata = sources.read_metadata(url)
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < rows:
            read = sources.read_groups(url, [group])
            return [text for batch in read for text in sources.texts(batch)][row]
        row -= rows
    raise ValueError(f"{url} has no row {row}")
