"""How is one piece of a corpus, a run of row groups of one file, encoded, and how is it known to be whole?

A piece is three files in a place that its workers share: tokens, an index of its documents, and last the counts
that make it complete. Its name changes when its content would, so what another corpus left is never taken for it.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects, parquet
from storage.batch_tokenizer import Encode, Mismatch, batch_tokenizer, encode_by_reference, encode_in_parts

log = logging.getLogger(__name__)

EDITION = 2  # of what is written: raise it when the same corpus gives other bytes
PIECE_TEXT = 64 * 2**20  # bytes of text a piece: a few seconds of work, lost when a worker dies
BATCH_TEXT = 4 * 2**20  # bytes of text encoded at once

KINDS = ("bin", "parquet", "json")  # tokens, index, and last the counts that say that it is complete
INDEX_SCHEMA = pa.schema(
    [("id", pa.string()), ("url", pa.string()), ("dump", pa.string())]
    + [("file", pa.string()), ("row", pa.int64())]  # where the document came from; see `named`
    + [("start", pa.int64())]  # of its EOT in this piece or shard; below 0 where it began in an earlier shard
    + [("position", pa.int64())]  # of its EOT in the whole corpus's stream
    + [("tokens", pa.int64())]  # its length with the EOT
)


@dataclass(frozen=True)
class Piece:
    index: int  # its place in the corpus
    url: str
    file: str  # the same, as the index names it
    groups: tuple[int, ...]
    first_row: int
    text_bytes: int
    key: str  # of what defines its content

    def name(self, kind: str) -> str:
        return f"{self.index:06d}-{self.key}.{kind}"

    def path(self, place: str, kind: str) -> str:
        return objects.join(place, self.name(kind))


@dataclass(frozen=True)
class Encoded:
    """What is known of a complete piece."""

    tokens: int
    documents: int


def named(url: str, root: str) -> str:
    """A file's path from `root`, if it lies below it: so stores that hold the same corpus have the same indexes."""
    return url.removeprefix(f"{root.rstrip('/')}/") if root else url


def plan_pieces(files: Sequence[str], root: str = "", first: int = 0) -> list[Piece]:
    """The pieces of files in corpus order, from their metadata alone; `first` counts the pieces before them."""
    pieces: list[Piece] = []
    with ThreadPoolExecutor(16) as pool:
        described = list(pool.map(lambda url: (url, parquet.read_metadata(url), objects.stat(url)), files))
    for url, metadata, stat in described:
        file = named(url, root)
        content = f"{EDITION} {file} {stat}"
        row = 0
        for groups, text_bytes in _group_runs(parquet.group_text_bytes(metadata)):
            key = hashlib.sha256(f"{content} {groups}".encode()).hexdigest()[:16]
            pieces.append(Piece(first + len(pieces), url, file, groups, row, text_bytes, key))
            row += sum(metadata.row_group(g).num_rows for g in groups)
    return pieces


def _group_runs(text_bytes: list[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Neighbouring row groups of about PIECE_TEXT together: (their numbers, bytes of text)."""
    run: list[int] = []
    size = 0
    for group, here in enumerate(text_bytes):
        if run and size + here > PIECE_TEXT:
            yield tuple(run), size
            run, size = [], 0
        run.append(group)
        size += here
    if run:
        yield tuple(run), size


def read_encoded(place: str, piece: Piece) -> Encoded | None:
    url = piece.path(place, "json")
    return Encoded(**objects.read_json(url)) if objects.exists(url) else None


def encode_piece(place: str, piece: Piece) -> tuple[Piece, Encoded]:
    """Encode a piece into `place`, a local folder or one on S3, unless it is there."""
    if there := read_encoded(place, piece):
        return piece, there
    try:
        return piece, _encode_piece(place, piece, batch_tokenizer().encode)
    except Mismatch as mismatch:
        log.warning("the fast tokenizer is wrong on %s (%s): tiktoken encodes this piece", piece.url, mismatch)
        return piece, _encode_piece(place, piece, encode_by_reference)


def _encode_piece(place: str, piece: Piece, encode: Encode) -> Encoded:
    lengths, described = [np.zeros(0, dtype=np.int64)], []
    with scratch_beside(place) as scratch:
        with open(f"{scratch}/bin", "wb") as f:
            read = parquet.read_groups(piece.url, piece.groups)
            for texts, descriptions in parquet.text_batches(read, BATCH_TEXT):
                tokens, counts = encode(texts) if len(texts) > 1 else encode_in_parts(texts[0], BATCH_TEXT, encode)
                tokens.tofile(f)
                lengths.append(counts)
                described += descriptions
        counts = np.concatenate(lengths)
        pq.write_table(_index(piece, counts, described), f"{scratch}/parquet", compression="zstd")
        for kind in KINDS[:2]:
            move_into_place(f"{scratch}/{kind}", piece.path(place, kind))
    encoded = Encoded(int(counts.sum()), len(counts))
    objects.publish_json(piece.path(place, "json"), asdict(encoded))
    return encoded


def scratch_beside(place: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the disk of `place` if that is local, so that files move there by a rename."""
    if objects.is_local(place):
        os.makedirs(place, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=place, prefix="partial-")
    return tempfile.TemporaryDirectory()


def move_into_place(local: str, url: str) -> None:
    """Move a finished scratch file to where it appears whole."""
    if objects.is_local(url):
        objects.sync(local)  # a machine that loses its power may otherwise keep the name and lose the bytes
        os.replace(local, url)
    else:
        objects.publish_file(local, url)


def _index(piece: Piece, lengths: np.ndarray, described: list[pa.RecordBatch]) -> pa.Table:
    """The documents of a piece; `start` and `position` count from its first token."""
    rows = len(lengths)
    known = pa.Table.from_batches(described) if described else pa.table({})
    absent = pa.nulls(rows, pa.string())
    columns = {
        name: known[name].cast(pa.string()) if name in known.column_names else absent for name in ("id", "url", "dump")
    }
    columns["file"] = pa.array([piece.file] * rows, pa.string())
    columns["row"] = pa.array(np.arange(piece.first_row, piece.first_row + rows))
    columns["start"] = columns["position"] = pa.array(np.cumsum(lengths) - lengths)
    columns["tokens"] = pa.array(lengths)
    return pa.table(columns, schema=INDEX_SCHEMA)
