"""How is one piece of a corpus, a run of row groups of one file, encoded, and how is it known to be whole?

A piece is three files in a place that its workers share: tokens, an index of its documents, and last the counts
that make it complete. Its name changes when its content would, so what another corpus left is never taken for it.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects, parquet
from storage.batch_tokenizer import Encode, Mismatch, batch_tokenizer, encode_by_reference, encode_in_parts

log = logging.getLogger(__name__)

EDITION = 3  # of what is written: raise it when the same corpus gives other bytes
PIECE_TEXT = 64 * 2**20  # bytes of text a piece: a few seconds of work, lost when a worker dies
BATCH_TEXT = 4 * 2**20  # bytes of text encoded at once
INDEX_ROWS = 2**17  # documents in a row group of an index, and in memory at once
INDEX_REPEATS = ["dump", "file"]  # columns of few values, kept as numbers into a list of these

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
        described = list(pool.map(lambda url: (parquet.read_metadata(url), _content(url)), files))
    for url, (metadata, read) in zip(files, described, strict=True):
        file = named(url, root)
        content = f"{EDITION} {file} {read}"
        row = 0
        for groups, text_bytes in _group_runs(parquet.group_text_bytes(metadata)):
            key = hashlib.sha256(f"{content} {groups}".encode()).hexdigest()[:16]
            pieces.append(Piece(first + len(pieces), url, file, groups, row, text_bytes, key))
            row += sum(metadata.row_group(g).num_rows for g in groups)
    return pieces


def _content(url: str) -> str:
    """What tells a file from others: its bytes, not when they were written, so that a copy counts as the same."""
    return f"{objects.stat(url).bytes} {parquet.check_file(url)}"


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
    with scratch_beside(place) as scratch:
        with open(f"{scratch}/bin", "wb") as f:
            documents = write_index(f"{scratch}/parquet", _encode_into(f, piece, encode))
            encoded = Encoded(f.tell() // 2, documents)
        for kind in KINDS[:2]:
            move_into_place(f"{scratch}/{kind}", piece.path(place, kind))
    objects.publish_json(piece.path(place, "json"), asdict(encoded))
    return encoded


def _encode_into(f: IO[bytes], piece: Piece, encode: Encode) -> Iterator[pa.Table]:
    """Write the tokens of a piece to `f` -> the index of its documents, batch by batch, as they are written."""
    row = piece.first_row
    for texts, described in parquet.text_batches(parquet.read_groups(piece.url, piece.groups), BATCH_TEXT):
        first = f.tell() // 2
        tokens, lengths = encode(texts) if len(texts) > 1 else encode_in_parts(texts[0], BATCH_TEXT, encode)
        tokens.tofile(f)
        yield _index(piece.file, row, first, lengths, pa.Table.from_batches(described))
        row += len(texts)


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


def _index(file: str, row: int, first: int, lengths: np.ndarray, described: pa.Table) -> pa.Table:
    """Documents from `row` of a file and token `first` of their piece on, where `start` and `position` count from."""
    rows = len(lengths)
    absent = pa.nulls(rows, pa.string())
    columns = {
        name: _words(described[name].combine_chunks()) if name in described.column_names else absent
        for name in ("id", "url", "dump")
    }
    columns["file"] = pa.repeat(file, rows)
    columns["row"] = pa.array(np.arange(row, row + rows))
    columns["start"] = columns["position"] = pa.array(first + np.cumsum(lengths) - lengths)
    columns["tokens"] = pa.array(lengths)
    return pa.table(columns, schema=INDEX_SCHEMA)


def _words(column: pa.Array) -> pa.Array:
    """A column as strings; in one of bytes, those that are no UTF-8 as U+FFFD."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        return pa.array([None if value is None else value.decode(errors="replace") for value in values], pa.string())


def write_index(local: str, tables: Iterable[pa.Table]) -> int:
    """Write an index; its bytes depend on its documents, not on the tables that they come in -> how many there are."""
    documents, held = 0, INDEX_SCHEMA.empty_table()
    with pq.ParquetWriter(local, INDEX_SCHEMA, compression="zstd", use_dictionary=INDEX_REPEATS) as writer:
        for table in tables:
            documents += len(table)
            held = pa.concat_tables([held, table])
            while len(held) >= INDEX_ROWS:
                writer.write_table(held.slice(0, INDEX_ROWS).combine_chunks())
                held = held.slice(INDEX_ROWS)
        if len(held):
            writer.write_table(held.combine_chunks())
    return documents
