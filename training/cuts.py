"""How is a shard cut from the pieces it runs over, with an index that leads back to its documents?"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from storage import objects, parquet, shards
from storage.records import File
from training.pieces import INDEX_ROWS, INDEX_SCHEMA, Piece, scratch_beside, write_index

COPY_TOKENS = 2**22  # tokens copied at once


@dataclass(frozen=True)
class Cut:
    """One shard to be cut: its place in the corpus's stream and the pieces that it runs over."""

    index: int
    start: int  # first token, in the corpus's stream
    stop: int
    pieces: tuple[Piece, ...]
    piece_starts: tuple[int, ...]

    def overlaps(self) -> Iterator[tuple[Piece, int]]:
        """Each piece with its first token's place in the stream."""
        return zip(self.pieces, self.piece_starts, strict=True)


def record_name(index: int) -> str:
    """The file that says, once a shard is published, which files it has."""
    return f"shard-{index:06d}.json"


def cut_shard(place: str, out: str, corpus: str, cut: Cut) -> tuple[Cut, list[File]]:
    """Publish one shard of `out` and, before it, the index of its documents."""
    name = shards.shard_name(corpus, shards.split_of(cut.index), cut.index)
    with scratch_beside(place) as scratch:
        write_index(f"{scratch}/index", _shard_index(place, cut))
        _write_tokens(place, cut, f"{scratch}/tokens")
        index = _publish_described(f"{scratch}/index", out, shards.index_name(name))
        files = [_publish_described(f"{scratch}/tokens", out, name), index]
    objects.publish_json(objects.join(place, record_name(cut.index)), [asdict(f) for f in files])
    return cut, files


def _publish_described(local: str, out: str, name: str) -> File:
    url = objects.join(out, name)
    digest = objects.sha256(local)
    objects.publish_file(local, url)
    stat = objects.stat(url)
    return File(name, stat.bytes, stat.modified, digest)


def _write_tokens(place: str, cut: Cut, local: str) -> None:
    with open(local, "wb") as f:
        f.write(shards.header(shards.MAGIC, cut.stop - cut.start))
        for piece, start in cut.overlaps():
            first = max(0, cut.start - start)
            for block in _piece_tokens(piece.path(place, "bin"), first, cut.stop - start):
                block.tofile(f)


def _piece_tokens(url: str, first: int, stop: int) -> Iterator[np.ndarray]:
    """Tokens `first` to `stop`, or to the end, of a piece, block by block."""
    with objects.open_file(url) as f:
        f.seek(2 * first)
        while first < stop and (data := f.read(2 * min(COPY_TOKENS, stop - first))):
            block = np.frombuffer(data, dtype="<u2")
            first += len(block)
            yield block


def _shard_index(place: str, cut: Cut) -> Iterator[pa.Table]:
    """Every document that has a token in the shard, the one that runs in from the shard before included."""
    for piece, start in cut.overlaps():
        for table in parquet.read_tables(piece.path(place, "parquet"), INDEX_ROWS):
            begins = table["position"].to_numpy() + start
            inside = (begins < cut.stop) & (begins + table["tokens"].to_numpy() > cut.start)
            table = table.filter(pa.array(inside))
            columns = {name: table[name] for name in table.column_names}
            columns |= {"start": pa.array(begins[inside] - cut.start), "position": pa.array(begins[inside])}
            yield pa.table(columns, schema=INDEX_SCHEMA)


def document_at(shard: str, position: int) -> dict[str, object]:
    """The document that holds a token of a shard: its id, url, dump, file, row, start and length.

    Raises ValueError where the shard has no such position.
    """
    count = shards.read_header(shard)
    if not 0 <= position < count:
        raise ValueError(f"{shard} has no token {position:,}, only 0 to {count - 1:,}")
    if not objects.exists(shards.index_name(shard)):
        raise ValueError(f"{os.path.basename(shard)} has no index of documents: it was tokenized elsewhere")
    table = parquet.read_table(shards.index_name(shard))
    row = int(np.searchsorted(table["start"].to_numpy(), position, side="right")) - 1
    return table.slice(row, 1).to_pylist()[0]
