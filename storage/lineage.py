"""What came from what: which documents, code and weights does an output, a file or a score stand on?

A DuckDB index over the store's records. The records are the truth: the index takes in what changed, can be
rebuilt from them at any time, and a lost or damaged one loses nothing. A change is made to a copy, which then
takes the index's name, by one process at a time: whoever reads, in whatever program and however long, waits for
nobody and holds nobody up, and an index is never seen half-written.
"""

import fcntl
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from storage import lineage_rows as rows_of
from storage import lineage_schema as schema
from storage import objects
from storage.contents import UNREADABLE, why
from storage.documents import quoted, show_documents
from storage.lineage_rows import FOLLOWS, Rows, Taken

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

READERS = 16  # files of a store that are read at once
MOST_NAMED = 12  # outputs that a message lists


@dataclass(frozen=True)
class Node:
    """An output and what it was made from."""

    key: str
    job: str  # the asset that made it; "" where it has no record: a run that still trains, or one that is gone
    fingerprint: str
    replaced: bool = False  # the store now holds another version of it than the one that was used
    inputs: tuple["Node", ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Mapping[str, Any], ...] = ()  # path, size, sha256


@dataclass(frozen=True)
class Cost:
    key: str
    job: str
    seconds: float | None
    gpu_hours: float | None
    dollars: float | None
    joules: float | None  # None: they could not be read
    goodput: float | None  # of training: useful steps over all that were paid for
    restarts: int | None
    rewinds: int | None
    skipped_updates: int | None


CHILDREN = """
SELECT a.name, a.job, a.fingerprint FROM edges e JOIN artifacts a ON a.name = e.output AND a.namespace = e.namespace
WHERE (e.namespace, e.input) = (?, ?) ORDER BY 1
"""

# whether a query reads a table of that name, as DuckDB's own parser sees it
NAMES_DOCUMENTS = """
SELECT list_contains(json_extract_string(lower(json_serialize_sql(?)), '$..table_name'), 'documents')
"""

# by its name in the store, or as runs name it
CORPUS = """
SELECT namespace, name FROM artifacts WHERE $2 IN ('', namespace) AND job = 'documents'
AND (name IN ('corpora/' || $1 || '/documents', $1 || '/documents')
     OR (namespace, name) IN (SELECT (namespace, documents) FROM runs WHERE corpus = $1))
ORDER BY namespace, name
"""

DESCENDANTS = """
WITH RECURSIVE below(name, distance) AS (
    SELECT output, 1 FROM edges WHERE namespace = ? AND list_contains(?, input)
    UNION
    SELECT e.output, b.distance + 1 FROM edges e JOIN below b ON e.input = b.name WHERE e.namespace = ?
)
SELECT b.name, a.job, a.fingerprint FROM below b JOIN artifacts a ON a.name = b.name AND a.namespace = ?
GROUP BY ALL ORDER BY min(distance), b.name
"""

# of an output; of a run, with all that was made of it, but not with the other models that its report compares it to
COSTS = """
WITH RECURSIVE above(name) AS (
    SELECT name FROM artifacts WHERE namespace = $1 AND ($2 = name OR $2 = 'runs/' || run)
    UNION
    SELECT e.input FROM edges e JOIN above a ON e.output = a.name
    WHERE e.namespace = $1 AND NOT (e.output = $2 || '/report' AND regexp_matches(e.input, '^(models|runs)/'))
)
SELECT a.name, a.job, c.* EXCLUDE (namespace, dataset)
FROM artifacts a JOIN costs c ON c.namespace = a.namespace AND c.dataset = a.name
WHERE a.namespace = $1 AND a.name IN (SELECT name FROM above)
ORDER BY c.dollars DESC NULLS LAST, c.gpu_hours DESC NULLS LAST, c.seconds DESC NULLS LAST, a.name
"""


class Lineage:
    """The index in one file. Every call opens, works and closes.

    `store`: the one whose outputs are meant where several have such a key; "" for any.
    """

    def __init__(self, path: Path, store: str = ""):
        self.path, self.store = Path(path), store

    def ingest(self, store: str) -> int:
        """Take in new and changed files of the store and forget those that are gone; how many these were."""
        return self._anew_if_damaged(lambda: self._ingest(store))

    def add(self, store: str, key: str) -> None:
        """Take in one output, without a look at the rest of the store."""
        read = _read(store, rows_of.files_beside(store, key))
        self._anew_if_damaged(lambda: self._write(lambda connection: _replace(connection, store, read)))

    def rebuild(self, store: str) -> int:
        """Make the index of `store` anew from its records; how many files were read."""
        read = _read(store, rows_of.files_of(store))

        def change(connection: duckdb.DuckDBPyConnection) -> None:
            _forget_stores(connection, [store, *_gone(connection)])
            _insert(connection, read.values())

        self._anew_if_damaged(lambda: self._write(change))
        return len([rows for rows in read.values() if rows])

    def sql(self, query: str, documents: Sequence[str] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Answer a query: (column names, rows). Nothing can be changed and no other file is read.

        The tables have the rows of this index's store; under the database's name, as in `lineage.artifacts`, of all.
        `documents` are stores whose shards' indexes the table `documents` shows, where the query names it. Raises
        ValueError where the query is wrong, with DuckDB's reason.
        """

        def answer(connection: duckdb.DuckDBPyConnection) -> tuple[list[str], list[tuple[Any, ...]]]:
            try:
                return _answer(connection, self.store, query, documents)
            except duckdb.Error as error:
                if self._is_damage(error):
                    raise
                known = ", ".join((*schema.TABLES, "documents"))
                raise ValueError(f"{query!r} can't be answered: {error} (tables: {known})") from error

        return self._ask(answer)

    def ancestry(self, key: str) -> Node:
        """The tree of what `key` was made from, down to the documents.

        `key` is an output's ("runs/demo"), or a file's path or URL. Raises ValueError for an unknown one.
        """
        return self._ask(lambda connection: _node(connection, *_locate(connection, self.store, key)))

    def outputs(self, key: str) -> list[str]:
        """The output that `key` is, or all those that hold a file of that name; none where it is neither."""
        found = self._ask(lambda connection: _found(connection, self.store, key.rstrip("/")))
        return list(dict.fromkeys(name for _, name in found))

    def nearest(self, key: str) -> list[str]:
        """The outputs whose names are most like `key`."""
        return self._ask(lambda connection: _nearest(connection, self.store, key))

    def made_from(self, key: str) -> list[Node]:
        """The outputs that were made from `key` itself."""
        rows = self._ask(
            lambda connection: connection.execute(CHILDREN, _locate(connection, self.store, key)).fetchall()
        )
        return [Node(*row) for row in rows]

    def impact(self, *keys: str) -> list[Node]:
        """Every output that was made from `keys`, directly or not, the nearest first: what a fault in them reaches."""

        def below(connection: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
            found = [_locate(connection, self.store, key) for key in keys]
            store = found[0][0]
            return connection.execute(DESCENDANTS, [store, [key for _, key in found], store, store]).fetchall()

        return [Node(*row) for row in self._ask(below)]

    def cost(self, key: str) -> list[Cost]:
        """What `key` and everything that it was made from took, each output once, the dearest first.

        Of a run all its stages count, made from its weights or not.
        """

        def costs(connection: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
            return connection.execute(COSTS, _locate(connection, self.store, key)).fetchall()

        return [Cost(*row) for row in self._ask(costs)]

    def _ingest(self, store: str) -> int:
        with self._reading() as connection:
            known, stores_gone = _known(connection, store), _gone(connection)
        found = rows_of.files_of(store)  # one listing, which may take a while on S3; nobody waits for it
        gone = [path for path in known if path not in found]
        changed = [path for path, stamp in found.items() if path not in known or known[path][0] != stamp]
        taken = {path: (size, last) for path, (_, size, last) in known.items() if size}
        read = {path: rows for path, rows in _read(store, changed, taken).items() if rows or path in known}

        def change(connection: duckdb.DuckDBPyConnection) -> None:
            _forget_stores(connection, _gone(connection))
            _replace(connection, store, read, gone)

        if gone or read or stores_gone:
            self._write(change)
        return len(gone) + len(read)

    def _ask(self, question: Callable[[duckdb.DuckDBPyConnection], Answer]) -> Answer:
        """Of an index that turns out to be damaged, once more when it is filled anew."""

        def ask() -> Answer:
            with self._reading() as connection:
                return question(connection)

        try:
            return ask()
        except duckdb.Error:
            if not self.store:  # which of several stores were in it, nobody knows
                raise
            self._drop()
            self.ingest(self.store)
            return ask()

    def _is_damage(self, error: duckdb.Error) -> bool:
        """Whether the index is at fault, not the query; for a block that is not as it was written there is no class."""
        of_file = isinstance(error, duckdb.IOException) and str(self.path) in str(error)
        return (
            of_file
            or type(error) is duckdb.Error
            or isinstance(error, duckdb.InternalException | duckdb.FatalException)
        )

    def _anew_if_damaged(self, work: Callable[[], Any]) -> Any:
        """A file that DuckDB can't read, or not to its end, is dropped: the records have all that was in it."""
        try:
            return work()
        except duckdb.Error:
            self._drop()
            return work()

    def _drop(self) -> None:
        with self._alone():
            self.path.unlink(missing_ok=True)
            self._changes.unlink(missing_ok=True)

    @property
    def _changes(self) -> Path:
        """Where DuckDB keeps what was written into the index's file itself, as by its shell; of another file once that
        is replaced, and then the two can't be read together."""
        return self.path.with_name(self.path.name + ".wal")

    def _write(self, change: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        """Change the index, one process at a time; a process that dies in between leaves it as it was."""
        with self._alone():
            for left in self.path.parent.glob(f".{self.path.stem}-*"):  # by one that was killed: nobody else is here
                left.unlink()
            with self._copied() as copy:
                with duckdb.connect(str(copy)) as connection:
                    schema.prepare(connection)
                    connection.begin()
                    change(connection)
                    connection.commit()
                self._changes.unlink(missing_ok=True)
                copy.replace(self.path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _copied(self) -> Iterator[Path]:
        copy = self.path.with_name(f".{self.path.stem}-{uuid.uuid4().hex[:8]}")
        if self.path.exists():
            shutil.copyfile(self.path, copy)
        try:
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    @contextmanager
    def _reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if not self.path.exists():
            self._write(lambda connection: None)
        with ExitStack() as stack:
            connection = stack.enter_context(self._open(stack))
            if schema.version(connection) == schema.VERSION:
                yield connection
                return
        self._write(lambda connection: None)  # which empties one of another version
        with duckdb.connect(str(self.path), read_only=True) as connection:
            yield connection

    def _open(self, stack: ExitStack) -> duckdb.DuckDBPyConnection:
        try:
            return duckdb.connect(str(self.path), read_only=True)
        except duckdb.IOException as error:
            if "lock" not in str(error):
                raise
        # another program has it open to write, such as DuckDB's own shell
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory()), self.path.name)
        shutil.copyfile(self.path, copy)
        return duckdb.connect(str(copy), read_only=True)


def _answer(
    connection: duckdb.DuckDBPyConnection, store: str, query: str, documents: Sequence[str]
) -> tuple[list[str], list[tuple[Any, ...]]]:
    kinds = [statement.type for statement in connection.extract_statements(query)]
    if kinds != [duckdb.StatementType.SELECT]:
        raise ValueError(f"{query!r} can't be answered: only one SELECT is, the index stays as it is")
    if connection.execute(NAMES_DOCUMENTS, [query]).fetchone() == (True,):
        show_documents(connection, documents)
    if store:
        _show_only(connection, store)
    connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    result = connection.execute(query)
    return [c[0] for c in result.description or []], result.fetchall()


def _show_only(connection: duckdb.DuckDBPyConnection, store: str) -> None:
    """Have the name of each table mean the rows of one store."""
    (database,) = connection.execute("SELECT current_database()").fetchone() or ("",)
    for table in schema.TABLES:
        connection.execute(
            f'CREATE TEMP VIEW {table} AS SELECT * FROM "{database}".main.{table} WHERE namespace = {quoted([store])}'
        )


def _known(connection: duckdb.DuckDBPyConnection, store: str) -> dict[str, tuple[str, int, str]]:
    """What of a store is in the index: path → (modified, and of a run's metrics bytes and last line)."""
    query = "SELECT path, modified, coalesce(size, 0), coalesce(last, '') FROM ingested WHERE namespace = ?"
    return {path: (stamp, size, last) for path, stamp, size, last in connection.execute(query, [store]).fetchall()}


def _read(store: str, paths: Iterable[str], taken: Mapping[str, Taken] | None = None) -> dict[str, Rows]:
    """The rows of files, by path, many at a time, which matters on S3.

    A file that has gone since is left to the next ingest; one that can't be read has no rows, and a warning.
    """

    def one(path: str) -> Rows | None:
        try:
            return rows_of.read(store, path, (taken or {}).get(path, (0, "")))
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            log.warning("%s can't be read and is left out of the lineage: %s", objects.join(store, path), why(error))
            return {}

    paths = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return {path: rows for path, rows in zip(paths, pool.map(one, paths), strict=True) if rows is not None}


def _replace(
    connection: duckdb.DuckDBPyConnection, store: str, read: Mapping[str, Rows], gone: Sequence[str] = ()
) -> None:
    known = _known(connection, store)
    read = {path: rows for path, rows in read.items() if _fits(rows, known.get(path))}
    for path, rows in read.items():
        _forget(connection, store, path, rows.get(FOLLOWS) is None)
    for path in gone:
        if not objects.exists(objects.join(store, path)):  # another process may have made it since we looked
            _forget(connection, store, path)
    _insert(connection, read.values())


def _fits(rows: Rows, known: tuple[str, int, str] | None) -> bool:
    """Whether what these rows follow on is in the index; if another process changed that, the next ingest sees it."""
    return FOLLOWS not in rows or (known is not None and rows[FOLLOWS] == [(known[1],)])


def _gone(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Local stores that are not there any more, such as one that was moved."""
    stores = connection.execute(f"SELECT DISTINCT namespace FROM {schema.INGESTED}").fetchall()
    return [store for (store,) in stores if store.startswith("/") and not objects.exists(store)]


def _forget_stores(connection: duckdb.DuckDBPyConnection, stores: Sequence[str]) -> None:
    for table in (*schema.TABLES, schema.INGESTED) if stores else ():
        connection.execute(f"DELETE FROM {table} WHERE list_contains(?, namespace)", [stores])


def _forget(connection: duckdb.DuckDBPyConnection, store: str, path: str, with_rows: bool = True) -> None:
    where = "FROM ingested WHERE namespace = ? AND path = ?"
    for (dataset,) in connection.execute(f"SELECT dataset {where}", [store, path]).fetchall():
        for table, condition in rows_of.stands_on(path).items() if with_rows else ():
            connection.execute(f"DELETE FROM {table} WHERE namespace = $1 AND {condition}", [store, dataset])
    connection.execute(f"DELETE {where}", [store, path])


def _insert(connection: duckdb.DuckDBPyConnection, read: Collection[Rows]) -> None:
    """One statement a table: row by row takes a millisecond each."""
    import pyarrow as pa  # here alone: a question that finds nothing new is answered before this is loaded

    for table in (*schema.TABLES, schema.INGESTED):
        values = [row for rows in read for row in rows.get(table, [])]
        if values:
            columns = [pa.array(column) for column in zip(*values, strict=True)]
            connection.register("incoming", pa.table(columns, names=[f"c{n}" for n in range(len(columns))]))
            connection.execute(f"INSERT INTO {table} SELECT * FROM incoming")
            connection.unregister("incoming")


def _locate(connection: duckdb.DuckDBPyConnection, store: str, key: str) -> tuple[str, str]:
    """(store, name) of the output that `key` means, itself or through one of its files.

    Raises ValueError where there is none, or where it may be several.
    """
    wanted = key.rstrip("/")
    found = _found(connection, store, wanted)
    if len(found) > 1:
        names = [name if store else f"{namespace}/{name}" for namespace, name in found]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise ValueError(f"{key!r} may mean {len(names)} outputs: name one of {', '.join(names[:MOST_NAMED])}{more}")
    if not found:
        near = _nearest(connection, store, wanted)
        hint = f": did you mean {', '.join(near)}?" if near else ": nothing has been made here yet"
        raise ValueError(f"no output or file {key!r}{hint}")
    return found[0]


def _nearest(connection: duckdb.DuckDBPyConnection, store: str, wanted: str) -> list[str]:
    query = (
        "SELECT DISTINCT name FROM artifacts WHERE $2 IN ('', namespace) "
        "ORDER BY jaro_winkler_similarity(name, $1) DESC, name LIMIT 3"
    )
    return [name for (name,) in connection.execute(query, [wanted, store]).fetchall()]


def _found(connection: duckdb.DuckDBPyConnection, store: str, wanted: str) -> list[tuple[str, str]]:
    """(store, name) of the output of that name, or of every one that has such a file, or is such a corpus."""
    for name in dict.fromkeys([wanted, objects.absolute(wanted)]):  # a path from where the question was asked
        if found := _of_name(connection, store, name) or _of_file(connection, store, name):
            return found
    return connection.execute(CORPUS, [wanted, store]).fetchall()


def _of_name(connection: duckdb.DuckDBPyConnection, store: str, wanted: str) -> list[tuple[str, str]]:
    output = connection.execute(
        "SELECT namespace, name FROM artifacts WHERE $2 IN ('', namespace) "
        "AND ($1 IN (name, namespace || '/' || name) OR name = 'runs/' || $1) ORDER BY ended DESC",
        [wanted, store],
    )
    found = output.fetchone()
    return [found] if found else []


def _of_file(connection: duckdb.DuckDBPyConnection, store: str, wanted: str) -> list[tuple[str, str]]:
    # a score's file lies beside its record, not below it
    folder = "regexp_replace(dataset, '/scores/[^/]*$', '/scores')"
    return connection.execute(
        f"SELECT DISTINCT namespace, dataset FROM files WHERE $2 IN ('', namespace) AND $1 IN (path, "
        f"{folder} || '/' || path, namespace || '/' || {folder} || '/' || path) ORDER BY namespace, dataset",
        [wanted, store],
    ).fetchall()


FACTS = ("started", "ended", "rows", "tokens", "bytes", "commit", "dirty", "code_version", "revision", "url")


def _node(connection: duckdb.DuckDBPyConnection, store: str, key: str, used: str | None = None) -> Node:
    """`used` is the fingerprint that the output below was made from; None at the top."""
    row = connection.execute(
        "SELECT job, fingerprint, started, ended, row_count, tokens, size, commit, dirty, code_version, "
        "facets ->> 'revision', facets ->> 'url' "
        "FROM artifacts a LEFT JOIN environments e ON e.namespace = a.namespace AND e.dataset = a.name "
        "WHERE a.namespace = ? AND a.name = ?",
        [store, key],
    ).fetchone()
    if row is None:
        return Node(key, "", used or "", replaced=True)
    facts = {name: value for name, value in zip(FACTS, row[2:], strict=True) if value is not None}
    inputs = connection.execute(
        "SELECT input, input_fingerprint FROM edges WHERE namespace = ? AND output = ? ORDER BY input",
        [store, key],
    ).fetchall()
    replaced = used is not None and used != row[1]
    if replaced:  # what is there now is not what was used
        return Node(key, row[0], used or row[1], replaced, (), facts)
    files = connection.execute(
        "SELECT path, size, sha256 FROM files WHERE namespace = ? AND dataset = ? ORDER BY path", [store, key]
    ).fetchall()
    listed = tuple({"path": path, "bytes": size, "sha256": digest} for path, size, digest in files)
    below = tuple(_node(connection, store, i, f) for i, f in inputs)
    return Node(key, row[0], row[1], replaced, below, facts, listed)
