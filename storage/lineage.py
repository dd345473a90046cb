"""What came from what: which documents, code and weights does an output, a file or a score stand on?

A DuckDB index over the store's records. The records are the truth: the index takes in what changed, can be
rebuilt from them at any time, and a lost one loses nothing. DuckDB admits one process at a time, so
connections are short and taken in turn through a lock file. Names follow OpenLineage where it has one: a
job makes outputs from inputs.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from storage import objects
from storage.records import Record, from_json

SCHEMA_VERSION = 1
ROWS_AT_ONCE = 200  # in one INSERT
TABLES = {  # what `gpt2 lineage sql` shows; a key is an output's path in its store
    "artifacts": "store VARCHAR, key VARCHAR, job VARCHAR, fingerprint VARCHAR, code_version VARCHAR, "
    "run VARCHAR, config JSON, started TIMESTAMPTZ, ended TIMESTAMPTZ, seconds DOUBLE, gpu_hours DOUBLE, "
    "dollars DOUBLE, rows BIGINT, tokens BIGINT, bytes BIGINT, commit VARCHAR, dirty BOOLEAN, versions JSON, "
    "hardware JSON",
    "files": "store VARCHAR, key VARCHAR, path VARCHAR, bytes BIGINT, modified VARCHAR, sha256 VARCHAR",
    "edges": "store VARCHAR, output VARCHAR, input VARCHAR, input_fingerprint VARCHAR",
    "metrics": "store VARCHAR, key VARCHAR, name VARCHAR, value DOUBLE",
    "scores": "store VARCHAR, key VARCHAR, run VARCHAR, suite VARCHAR, name VARCHAR, value DOUBLE, "
    "stderr DOUBLE, items BIGINT",
    "ingested": "store VARCHAR, key VARCHAR, url VARCHAR, modified VARCHAR",
}


@dataclass(frozen=True)
class Node:
    """An output and what it was made from."""

    key: str
    job: str  # the asset that made it; "" where its record is gone
    fingerprint: str
    replaced: bool = False  # the store now holds another version of it than the one that was used
    inputs: tuple["Node", ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    key: str
    job: str
    seconds: float
    gpu_hours: float
    dollars: float


DESCENDANTS = """
WITH RECURSIVE below(key, distance) AS (
    SELECT output, 1 FROM edges WHERE store = ? AND input = ?
    UNION
    SELECT e.output, b.distance + 1 FROM edges e JOIN below b ON e.input = b.key WHERE e.store = ?
)
SELECT key, min(distance) AS nearest FROM below GROUP BY key ORDER BY nearest, key
"""

COSTS = """
WITH RECURSIVE above(store, key) AS (
    SELECT ?, ?
    UNION
    SELECT e.store, e.input FROM edges e JOIN above a ON e.output = a.key WHERE e.store = ?
)
SELECT key, job, coalesce(seconds, 0), coalesce(gpu_hours, 0), coalesce(dollars, 0)
FROM artifacts WHERE store = ? AND key IN (SELECT key FROM above) ORDER BY 5 DESC, 4 DESC, 3 DESC, 1
"""


class Lineage:
    """The index in one file. Every call opens, works and closes, so that others can have their turn."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def ingest(self, store: str) -> int:
        """Take in new and changed records and forget those that are gone; how many these were."""
        with self._writing() as connection:
            return _ingest(connection, store)

    def rebuild(self, store: str) -> int:
        """Make the index of `store` anew from its records; how many there are."""
        with self._writing() as connection:
            for table in TABLES:
                connection.execute(f"DELETE FROM {table} WHERE store = ?", [store])
            return _ingest(connection, store)

    def sql(self, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Answer a query: (column names, rows). Nothing can be changed and no other file is read.

        Raises ValueError where the query is wrong, with DuckDB's reason.
        """
        with self._reading() as connection:
            try:
                result = connection.execute(query)
                return [c[0] for c in result.description or []], result.fetchall()
            except duckdb.Error as error:
                raise ValueError(f"{query!r} can't be answered: {error} (tables: {', '.join(TABLES)})") from error

    def ancestry(self, key: str) -> Node:
        """The tree of what `key` was made from, down to the documents.

        `key` is an output's ("runs/demo"), or a file's path or URL. Raises ValueError for an unknown one.
        """
        with self._reading() as connection:
            store, found = _locate(connection, key)
            return _node(connection, store, found)

    def impact(self, key: str) -> list[Node]:
        """Every output that was made from `key`, directly or not, the nearest first: what a fault in it reaches."""
        with self._reading() as connection:
            store, found = _locate(connection, key)
            rows = connection.execute(DESCENDANTS, [store, found, store]).fetchall()
            return [Node(*_identity(connection, store, row[0])) for row in rows]

    def cost(self, key: str) -> list[Cost]:
        """What `key` and everything that it was made from took, each output once, the dearest first."""
        with self._reading() as connection:
            store, found = _locate(connection, key)
            return [Cost(*row) for row in connection.execute(COSTS, [store, found, store, store]).fetchall()]

    @contextmanager
    def _writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._turn(), duckdb.connect(str(self.path)) as connection:
            _prepare(connection)
            connection.begin()
            yield connection
            connection.commit()

    @contextmanager
    def _reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._turn():
            if not self.path.exists():
                with duckdb.connect(str(self.path)) as connection:
                    _prepare(connection)
            config: dict[str, Any] = {"enable_external_access": "false", "lock_configuration": "true"}
            with duckdb.connect(str(self.path), read_only=True, config=config) as connection:
                yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for our turn: DuckDB itself refuses a second process at once instead of waiting."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


def _prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the tables; those of another schema version are dropped, since records refill them."""
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER)")
    found = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    if found != (SCHEMA_VERSION,):
        for table in TABLES:
            connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.execute("DELETE FROM schema_version")
        connection.execute("INSERT INTO schema_version VALUES (?)", [SCHEMA_VERSION])
    for table, columns in TABLES.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")


def _ingest(connection: duckdb.DuckDBPyConnection, store: str) -> int:
    known = dict(connection.execute("SELECT url, modified FROM ingested WHERE store = ?", [store]).fetchall())
    found = {s.path: s.modified for s in objects.list_files(store, "record.json")}
    gone = [path for path in known if path not in found]
    changed = [path for path, modified in found.items() if known.get(path) != modified]
    for path in [*gone, *(path for path in changed if path in known)]:
        _forget(connection, store, path)
    rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in TABLES}
    for path in changed:
        url = objects.join(store, path)
        _describe(rows, store, path, found[path], from_json(url, objects.read_json(url)))
    for table, values in rows.items():
        for first in range(0, len(values), ROWS_AT_ONCE):
            _insert(connection, table, values[first : first + ROWS_AT_ONCE])
    return len(gone) + len(changed)


def _forget(connection: duckdb.DuckDBPyConnection, store: str, path: str) -> None:
    keys = connection.execute("SELECT key FROM ingested WHERE store = ? AND url = ?", [store, path]).fetchall()
    for (key,) in keys:
        for table in TABLES:
            column = "output" if table == "edges" else "key"
            connection.execute(f"DELETE FROM {table} WHERE store = ? AND {column} = ?", [store, key])


def _describe(rows: dict[str, list[tuple[Any, ...]]], store: str, path: str, modified: str, record: Record) -> None:
    """Add what a record says to the rows of each table."""
    key = record.key
    numbers, scores = _flatten(record.metrics)
    rows["artifacts"].append(_artifact(store, record))
    rows["files"] += [(store, key, f.path, f.bytes, f.modified, f.sha256) for f in record.files]
    rows["edges"] += [(store, key, p.key, p.fingerprint) for p in record.parents]
    rows["metrics"] += [(store, key, name, value) for name, value in numbers]
    suite = key.rsplit("/", 1)[-1]
    rows["scores"] += [(store, key, _run_of(key), suite, name, *score) for name, score in scores]
    rows["ingested"].append((store, key, path, modified))


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: list[tuple[Any, ...]]) -> None:
    """One statement for many rows: row by row takes a millisecond each."""
    row = f"({', '.join('?' * len(rows[0]))})"
    values = ", ".join([row] * len(rows))
    connection.execute(f"INSERT INTO {table} VALUES {values}", [value for one in rows for value in one])


def _artifact(store: str, record: Record) -> tuple[Any, ...]:
    cost = (record.cost.get(name) for name in ("seconds", "gpu_hours", "dollars"))
    return (
        *(store, record.key, record.asset, record.fingerprint, record.code_version, _run_of(record.key)),
        *(json.dumps(record.config), record.started, record.ended, *cost),
        *(record.rows, record.tokens, record.bytes, record.commit, record.dirty),
        *(json.dumps(record.versions), json.dumps(record.hardware)),
    )


def _run_of(key: str) -> str | None:
    """The run that an output belongs to; corpora, tokens and items are shared by runs."""
    return key.split("/")[1] if key.startswith("runs/") else None


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> tuple[list[Any], list[Any]]:
    """Numbers by their dotted name, and scores: entries of {value, stderr, n}."""
    numbers: list[Any] = []
    scores: list[Any] = []
    for name, value in metrics.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping) and isinstance(value.get("value"), int | float):
            short = full.removeprefix("scores.")
            scores.append((short, (value["value"], value.get("stderr"), value.get("n"))))
        elif isinstance(value, Mapping):
            inner = _flatten(value, f"{full}.")
            numbers, scores = numbers + inner[0], scores + inner[1]
        elif isinstance(value, int | float):
            numbers.append((full, float(value)))
    return numbers, scores


def _locate(connection: duckdb.DuckDBPyConnection, key: str) -> tuple[str, str]:
    """(store, key) of the output that `key` names, itself or through one of its files."""
    wanted = key.rstrip("/")
    found = (
        connection.execute(
            "SELECT store, key FROM artifacts WHERE $1 IN (key, store || '/' || key) OR key = 'runs/' || $1 "
            "ORDER BY ended DESC",
            [wanted],
        ).fetchone()
        or connection.execute(
            "SELECT store, key FROM files "
            "WHERE $1 IN (path, key || '/' || path, store || '/' || key || '/' || path) "
            "ORDER BY store, key",
            [wanted],
        ).fetchone()
    )
    if found is None:
        near = connection.execute(
            "SELECT key FROM artifacts ORDER BY jaro_winkler_similarity(key, ?) DESC LIMIT 3", [wanted]
        ).fetchall()
        hint = f": did you mean {', '.join(k for (k,) in near)}?" if near else ": nothing has been made here yet"
        raise ValueError(f"no output or file {key!r}{hint}")
    return found


def _identity(connection: duckdb.DuckDBPyConnection, store: str, key: str) -> tuple[str, str, str]:
    """(key, job, fingerprint) of an output of the store."""
    row = connection.execute("SELECT job, fingerprint FROM artifacts WHERE store = ? AND key = ?", [store, key])
    found = row.fetchone()
    assert found is not None  # edges are taken in with their output
    return key, found[0], found[1]


def _node(connection: duckdb.DuckDBPyConnection, store: str, key: str, used: str | None = None) -> Node:
    """`used` is the fingerprint that the output below was made from; None at the top."""
    row = connection.execute(
        "SELECT job, fingerprint, started, ended, rows, tokens, bytes, commit, dirty, code_version "
        "FROM artifacts WHERE store = ? AND key = ?",
        [store, key],
    ).fetchone()
    if row is None:
        return Node(key, "", used or "", replaced=True)
    names = ("started", "ended", "rows", "tokens", "bytes", "commit", "dirty", "code_version")
    facts = {name: value for name, value in zip(names, row[2:], strict=True) if value is not None}
    inputs = connection.execute(
        "SELECT input, input_fingerprint FROM edges WHERE store = ? AND output = ? ORDER BY input",
        [store, key],
    ).fetchall()
    replaced = used is not None and used != row[1]
    below = () if replaced else tuple(_node(connection, store, i, f) for i, f in inputs)
    return Node(key, row[0], used or row[1], replaced, below, facts)
