"""Where in the token shards does a document lie, and which documents are there at all?

Beside each shard lies an index of its documents. To find one of ten million by its id or URL, a lookup of hashes
is made of them, once, in the home: sorted, so that a row group of it holds the answer. It is named by the shards'
fingerprint, and made anew where it is missing.
"""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from storage import objects
from storage.records import Record, file_url
from storage.shards import INDEX

LOOKUP_MEMORY = "4GB"  # that sorting may take; beyond it DuckDB goes to the disk
COLUMNS = ("id", "url", "dump", "file", "row", "start", "position", "tokens")


@dataclass(frozen=True)
class Place:
    """A document, or the part of it that lies in one shard."""

    shard: str  # its index's file is named after it
    id: str
    url: str
    dump: str
    file: str  # that it was read from
    row: int
    start: int  # of its first token in the shard; below 0 where it began in the shard before
    position: int  # of its first token in the corpus
    tokens: int


def find(store: str, tokens: Record, home: Path, document: str) -> list[Place]:
    """Every place of the document with this id or URL in an output of token shards; empty where it is in none.

    Raises ValueError for shards without indexes, which were tokenized elsewhere.
    """
    indexes = _indexes(store, tokens)
    lookup = lookup_of(store, tokens, home)
    with _connected([*indexes]) as connection:
        query = "SELECT DISTINCT shard FROM read_parquet(?) WHERE hash = hash(?)"
        found = [indexes[n] for (n,) in connection.execute(query, [str(lookup), document]).fetchall()]
        if not found:
            return []
        rows = connection.execute(
            f"SELECT filename, {', '.join(COLUMNS)} FROM read_parquet(?, filename = true) "
            "WHERE id = ? OR url = ? ORDER BY position, filename",
            [found, document, document],
        ).fetchall()
    return [Place(objects.name_of(url).removesuffix(INDEX) + ".bin", *map(_known, row)) for url, *row in rows]


def has_indexes(tokens: Record) -> bool:
    """Not, where the shards were tokenized elsewhere."""
    return any(f.path.endswith(INDEX) for f in tokens.files)


def lookup_of(store: str, tokens: Record, home: Path) -> Path:
    """The file of hashes, made now if it is not there: seconds for 10 million documents."""
    path = home / "documents" / f"{tokens.fingerprint[:16]}-duckdb-{duckdb.__version__}.parquet"  # whose hash it is
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        indexes = _indexes(store, tokens)
        partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial")
        with _connected(indexes) as connection:
            memory, folder = quoted([LOOKUP_MEMORY]), quoted([str(path.parent)])
            connection.execute(f"SET memory_limit = {memory}; SET temp_directory = {folder}")
            connection.execute(
                "CREATE TABLE indexes AS SELECT unnest(?) AS url, unnest(?) AS shard", [indexes, [*range(len(indexes))]]
            )
            read = "read_parquet(?, filename = true) d JOIN indexes i ON i.url = d.filename"
            connection.execute(
                f"COPY (SELECT hash(d.id) AS hash, shard FROM {read} "
                f"UNION ALL SELECT hash(d.url), shard FROM {read} WHERE d.url <> '' ORDER BY ALL) "
                f"TO {quoted([str(partial)])} (FORMAT parquet)",
                [indexes, indexes],
            )
        os.replace(partial, path)
    return path


def show_documents(connection: duckdb.DuckDBPyConnection, stores: Sequence[str]) -> None:
    """Give an index's connection the table `documents`: every document of the stores' shards, where they lie."""
    rows = connection.execute(
        "SELECT namespace, dataset, path FROM files "
        f"WHERE list_contains(?, namespace) AND path LIKE '%{INDEX}' ORDER BY ALL",
        [list(stores)],
    ).fetchall()
    found = {file_url(*row): row for row in rows}
    if not found:
        empty = "namespace VARCHAR, dataset VARCHAR, shard VARCHAR, id VARCHAR, url VARCHAR, dump VARCHAR, file VARCHAR"
        numbers = '"row" BIGINT, start BIGINT, position BIGINT, tokens BIGINT'
        connection.execute(f"CREATE TEMP TABLE documents ({empty}, {numbers})")
        return
    _reach(connection, [*found])
    listed = quoted([*found])
    connection.execute(f"SET allowed_paths = [{listed}]")
    connection.execute(
        "CREATE TEMP TABLE shard_indexes AS SELECT unnest(?) AS index_url, unnest(?) AS namespace, "
        "unnest(?) AS dataset, unnest(?) AS shard",
        [[*found], *map(list, zip(*found.values(), strict=True))],
    )
    connection.execute(
        f"CREATE TEMP VIEW documents AS SELECT namespace, dataset, replace(shard, '{INDEX}', '.bin') AS shard, "
        f"{', '.join(f'd.{name}' for name in COLUMNS)} "
        f"FROM read_parquet([{listed}], filename = true) d JOIN shard_indexes ON index_url = d.filename"
    )


def _indexes(store: str, tokens: Record) -> list[str]:
    found = [file_url(store, tokens.key, f.path) for f in tokens.files if f.path.endswith(INDEX)]
    if not found:
        raise ValueError(f"the shards in {tokens.key} have no index of their documents: they were tokenized elsewhere")
    return found


def _connected(urls: Sequence[str]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})
    _reach(connection, urls)
    return connection


def _reach(connection: duckdb.DuckDBPyConnection, urls: Sequence[str]) -> None:
    if not all(map(objects.is_local, urls)):
        connection.register_filesystem(objects.s3())


def quoted(values: Sequence[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _known(value: Any) -> Any:
    return "" if value is None else value
