"""Where do a corpus's documents come from?

Every source gives the same thing, parquet files with a `text` column in a fixed order, whether the
documents lie in a folder, on S3 or in Python itself. A source's identity is what defines its documents; its
name, safe in a path, tells two corpora apart.
"""

import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storage import embedded, objects
from storage.records import File, describe_file

TEXT = "text"
COLUMNS = ("text", "id", "dump", "url")  # what is read of each document, where it is there
FOOTER_BYTES = 64 * 1024  # of a parquet file's end, which holds the sizes and statistics of all of its data
BATCH_ROWS = 256  # rows in memory at once: documents may be a megabyte each

Progress = Callable[[int, int], None]


class Source(Protocol):
    """One corpus. `fetch` makes its files available and lists them in corpus order."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def text_column(self) -> str: ...
    def fetch(self, out: str, progress: Progress) -> list[File]: ...


def resolve(corpus: str) -> Source:
    """The source that `corpus` names: "embedded", a folder of parquet files, or an s3:// URL of one.

    Raises ValueError where there is no such thing, naming the value and the fix.
    """
    if corpus == "embedded":
        return Embedded()
    if not objects.is_local(corpus) or os.path.isdir(corpus):
        return Folder.at(corpus)
    raise ValueError(f"no corpus {corpus!r}: {_suggestion(corpus)}")


def _suggestion(corpus: str) -> str:
    if os.path.sep in corpus:
        return "there is no such folder; name a folder of parquet files, an s3:// URL, or embedded"
    folders = [entry.name for entry in os.scandir(".") if entry.is_dir()]
    close = difflib.get_close_matches(corpus, ["embedded", *folders], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}A corpus is embedded, a folder of parquet files, or an s3:// URL"


class Embedded:
    """The English that every Python carries; its version is the corpus's revision."""

    text_column = TEXT

    def __init__(self) -> None:
        self.name = f"embedded-{embedded.revision()}"
        self.identity = {"kind": "embedded", "revision": embedded.revision(), "edition": embedded.EDITION}

    def fetch(self, out: str, progress: Progress) -> list[File]:
        url = objects.join(out, "000_00000.parquet")
        with tempfile.TemporaryDirectory() as scratch:
            local = os.path.join(scratch, "documents.parquet")
            embedded.write_parquet(local)
            objects.publish_file(local, url)
        file = describe_file(out, "000_00000.parquet")
        progress(file.bytes, file.bytes)
        return [file]


@dataclass(frozen=True)
class Folder:
    """Parquet files that stay where they are, local or on S3, in the order of their names."""

    url: str
    name: str
    identity: dict[str, Any]
    text_column: str = TEXT

    @classmethod
    def at(cls, url: str) -> "Folder":
        url = os.path.abspath(url) if objects.is_local(url) else url.rstrip("/")
        found = objects.list_files(url, ".parquet")
        if not found:
            raise ValueError(f"{url} holds no .parquet file: name a folder that does, or put documents there")
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(lambda stat: _check_file(objects.join(url, stat.path)), found))
        files = [
            {"path": stat.path, "bytes": stat.bytes, "footer_sha256": footer}
            for stat, footer in zip(found, footers, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        name = f"{safe_name(objects.name_of(url))}-{digest[:8]}"
        return cls(url, name, {"kind": "parquet", "files": files})

    def fetch(self, out: str, progress: Progress) -> list[File]:
        total = sum(f["bytes"] for f in self.identity["files"])
        done, files = 0, []
        for entry in self.identity["files"]:
            files.append(describe_file(out, objects.join(self.url, entry["path"])))
            done += entry["bytes"]
            progress(done, total)
        return files


def safe_name(text: str) -> str:
    """`text` with what a path or an object key can't hold turned into dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "corpus"


def _check_file(url: str) -> str:
    """sha256 of a parquet file's end. Raises ValueError where it is broken or has no text column."""
    metadata = read_metadata(url)
    schema = metadata.schema.to_arrow_schema()
    if TEXT not in schema.names or not _is_text(schema.field(TEXT).type):
        columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise ValueError(
            f"{url} has no column `{TEXT}` of strings, only {columns}: rename the one with the text"
        )
    with objects.open_file(url) as f:
        f.seek(0, os.SEEK_END)
        f.seek(max(0, f.tell() - FOOTER_BYTES))
        return hashlib.sha256(f.read()).hexdigest()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)


def read_metadata(url: str) -> pq.FileMetaData:
    """Raises ValueError where `url` is no whole parquet file."""
    with objects.open_file(url) as f:
        try:
            return pq.ParquetFile(f).metadata
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{url} is no whole parquet file ({error}): fetch it again or remove it"
            ) from error


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
        parquet = pq.ParquetFile(f, buffer_size=2**20, pre_buffer=False)
        columns = [name for name in COLUMNS if name in parquet.schema_arrow.names]
        yield from parquet.iter_batches(BATCH_ROWS, groups, columns, use_threads=False)


def text_bytes(batch: pa.RecordBatch) -> list[bytes]:
    """The bytes of each document's text; a missing one is empty."""
    column = batch.column(batch.schema.get_field_index(TEXT)).cast(pa.large_binary())
    return [value or b"" for value in column.to_pylist()]


def texts(batch: pa.RecordBatch) -> list[str]:
    """The text of each document, bytes that are no UTF-8 (lone surrogates) as U+FFFD."""
    return [value.decode("utf-8", "replace") for value in text_bytes(batch)]
