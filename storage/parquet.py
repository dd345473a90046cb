"""How are documents read from parquet files, and how much text is in them?"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects

TEXT = "text"
COLUMNS = ("text", "id", "dump", "url")  # what is read of each document, where it is there
FOOTER_BYTES = 64 * 1024  # of a parquet file's end, which holds the sizes and statistics of all of its data
BATCH_ROWS = 32  # rows in memory at once, or fewer, of
BATCH_TEXT = 4 * 2**20  # about so many bytes of text, if they are like their row group
BATCH_DOCUMENTS = 2**16  # handed on together at most: the other columns of short documents outweigh their text


def check_file(url: str) -> str:
    """sha256 of a parquet file's end. Raises ValueError where it is broken, has no text column, or another of the
    COLUMNS that can't be told in words."""
    metadata = read_metadata(url)
    schema = metadata.schema.to_arrow_schema()
    if not any(_is_text(schema.field(at).type) for at in schema.get_all_field_indices(TEXT)):
        columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise ValueError(f"{url} has no column `{TEXT}` of strings, only {columns}: rename the one with the text")
    for name in COLUMNS:
        found = [schema.field(at).type for at in schema.get_all_field_indices(name)]
        if len(found) > 1:
            raise ValueError(f"{url} has {len(found)} columns `{name}`: leave one of them, or rename the others")
        if any(pa.types.is_nested(kind) for kind in found):
            raise ValueError(f"{url} has a column `{name}` of {found[0]}, not of strings or numbers: drop or rename it")
    with objects.open_file(url) as f:
        f.seek(0, os.SEEK_END)
        f.seek(max(0, f.tell() - FOOTER_BYTES))
        return hashlib.sha256(f.read()).hexdigest()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)


def footer_bytes(local: str) -> int:
    """Bytes at a parquet file's end that hold its metadata, by its last eight: their length, and the format's name."""
    with open(local, "rb") as f:
        f.seek(max(0, os.path.getsize(local) - 8))
        length, name = f.read(4), f.read(4)
    return int.from_bytes(length, "little") + 8 if name == b"PAR1" else 0


def read_table(url: str, columns: list[str] | None = None) -> pa.Table:
    with objects.open_file(url) as f:
        return pq.ParquetFile(f).read(columns, use_threads=False)


def read_tables(url: str, rows: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table, so many rows of it in memory at a time."""
    with objects.open_file(url) as f:
        for batch in pq.ParquetFile(f).iter_batches(rows, columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])


def read_metadata(url: str) -> pq.FileMetaData:
    """Raises ValueError where `url` is no whole parquet file."""
    with objects.open_file(url) as f:
        try:
            return pq.ParquetFile(f).metadata
        except pa.ArrowInvalid as error:
            raise ValueError(f"{url} is no whole parquet file ({error}): fetch it again or remove it") from error


def total_text_bytes(files: Sequence[str]) -> int:
    """Bytes of text in `files`, uncompressed, from their metadata alone."""
    with ThreadPoolExecutor(16) as pool:
        return sum(sum(group_text_bytes(m)) for m in pool.map(read_metadata, files))


def group_text_bytes(metadata: pq.FileMetaData) -> list[int]:
    """Uncompressed bytes of the text column in each row group: an upper bound where texts repeat."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column = paths.index(TEXT)
    groups = range(metadata.num_row_groups)
    return [metadata.row_group(g).column(column).total_uncompressed_size for g in groups]


def documents(files: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Documents of `files` in corpus order, as batches of the COLUMNS that a file has."""
    for url in files:
        yield from read_groups(url, None)


def read_groups(url: str, groups: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
    """Batches of some row groups of a file, all by default; memory stays bounded however large a group is."""
    with objects.open_file(url) as f:
        file = pq.ParquetFile(f, buffer_size=2**20, pre_buffer=False)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        yield from file.iter_batches(_rows_at_once(file.metadata, groups), groups, columns, use_threads=False)


def _rows_at_once(metadata: pq.FileMetaData, groups: Sequence[int] | None) -> int:
    sizes = group_text_bytes(metadata)
    chosen = range(len(sizes)) if groups is None else groups
    largest = max((sizes[g] // max(metadata.row_group(g).num_rows, 1) for g in chosen), default=0)
    return min(max(BATCH_TEXT // max(largest, 1), 1), BATCH_ROWS)


def text_batches(read: Iterable[pa.RecordBatch], size: int) -> Iterator[tuple[list[bytes], list[pa.RecordBatch]]]:
    """Documents in batches of at most `size` bytes of text, a larger one alone: (texts, their other columns).

    No more than BATCH_DOCUMENTS are in one.
    """
    found: list[bytes] = []
    others: list[pa.RecordBatch] = []
    held = 0
    for batch in read:
        described, first = batch.drop_columns([TEXT]), 0
        for row, text in enumerate(_each_text(batch)):
            if found and (held + len(text) > size or len(found) == BATCH_DOCUMENTS):
                yield found, [*others, described.slice(first, row - first)]
                found, others, held, first = [], [], 0, row
            found.append(text)
            held += len(text)
        others.append(described.slice(first))
    if found:
        yield found, others


def _each_text(batch: pa.RecordBatch) -> Iterator[bytes]:
    """The bytes of each document's text, one at a time; a missing one is empty."""
    column = batch.column(batch.schema.get_field_index(TEXT)).cast(pa.large_binary())
    return (value.as_py() or b"" for value in column)


def text_bytes(batch: pa.RecordBatch) -> list[bytes]:
    """The bytes of each document's text; a missing one is empty."""
    return list(_each_text(batch))


def texts(batch: pa.RecordBatch) -> list[str]:
    """The text of each document, bytes that are no UTF-8 (lone surrogates) as U+FFFD."""
    return [value.decode("utf-8", "replace") for value in text_bytes(batch)]


def texts_at(url: str, rows: Iterable[int]) -> dict[int, str]:
    """The text of rows of a file, by row, from one reading of each row group that holds one of them.

    Raises ValueError where the file has no such row.
    """
    wanted, first = sorted(set(rows)), 0
    found: dict[int, str] = {}
    metadata = read_metadata(url)
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if inside := [row for row in wanted if first <= row < first + count]:
            read = [text for batch in read_groups(url, [group]) for text in texts(batch)]
            found |= {row: read[row - first] for row in inside}
        first += count
    if wanted and wanted[-1] >= first:
        raise ValueError(f"{url} has no row {wanted[-1]}: it is not the file that the shards were made from")
    return found
