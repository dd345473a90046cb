"""Which tables does the index have, and what becomes of one that an older version of the project made?

A migration is a small function; its place in MIGRATIONS is the version that it leads to. An index that lacks some
gets them and is emptied: the records fill it again, so nothing of an older form is ever read. Names follow
OpenLineage (openlineage.io) where it has one, in snake case: a job makes datasets, each of a namespace and a name.
"""

from collections.abc import Callable

import duckdb

# The datasets' tables, as they are after all migrations. `documents` is added to each query, from the shards' indexes.
TABLES = ("artifacts", "files", "edges", "runs", "metrics", "scores", "checks", "costs", "environments")
INGESTED = "ingested"  # which files of a store are in the index, as of when


def _1_outputs(connection: duckdb.DuckDBPyConnection) -> None:
    """Outputs, their files, inputs, numbers and scores; `key` is an output's path in its store."""
    for table, columns in {
        "artifacts": "store VARCHAR, key VARCHAR, job VARCHAR, fingerprint VARCHAR, code_version VARCHAR, run VARCHAR, "
        "config JSON, started TIMESTAMPTZ, ended TIMESTAMPTZ, seconds DOUBLE, gpu_hours DOUBLE, dollars DOUBLE, "
        "rows BIGINT, tokens BIGINT, bytes BIGINT, commit VARCHAR, dirty BOOLEAN, versions JSON, hardware JSON",
        "files": "store VARCHAR, key VARCHAR, path VARCHAR, bytes BIGINT, modified VARCHAR, sha256 VARCHAR",
        "edges": "store VARCHAR, output VARCHAR, input VARCHAR, input_fingerprint VARCHAR",
        "metrics": "store VARCHAR, key VARCHAR, name VARCHAR, value DOUBLE",
        "scores": "store VARCHAR, key VARCHAR, run VARCHAR, suite VARCHAR, name VARCHAR, value DOUBLE, stderr DOUBLE, "
        "items BIGINT",
        "ingested": "store VARCHAR, key VARCHAR, url VARCHAR, modified VARCHAR",
    }.items():
        connection.execute(f"CREATE TABLE {table} ({columns})")


def _2_names_of_openlineage(connection: duckdb.DuckDBPyConnection) -> None:
    """A dataset's namespace and name, its rowCount and size; elsewhere `dataset` is the name of one."""
    for table in ("artifacts", "files", "edges", "metrics", "scores", "ingested"):
        _rename(connection, table, store="namespace")
    for table in ("files", "metrics", "scores", "ingested"):
        _rename(connection, table, key="dataset")
    _rename(connection, "artifacts", key="name", rows="row_count", bytes="size")
    _rename(connection, "files", bytes="size")
    _rename(connection, "ingested", url="path")


def _3_runs_checks_costs_environments(connection: duckdb.DuckDBPyConnection) -> None:
    """What was a column of an output, and is asked for by itself, gets a table; metrics get their step."""
    for column in ("seconds", "gpu_hours", "dollars", "commit", "dirty", "versions", "hardware"):
        connection.execute(f"ALTER TABLE artifacts DROP COLUMN {column}")
    connection.execute("ALTER TABLE artifacts ADD COLUMN file_count BIGINT")
    connection.execute("ALTER TABLE artifacts ADD COLUMN facets JSON")
    connection.execute("ALTER TABLE metrics ADD COLUMN step BIGINT")
    for table, columns in {
        "runs": "namespace VARCHAR, run VARCHAR, recipe VARCHAR, corpus VARCHAR, steps BIGINT, batch_tokens BIGINT, "
        "documents VARCHAR, tokens VARCHAR, config JSON",
        "checks": "namespace VARCHAR, dataset VARCHAR, assertion VARCHAR, success BOOLEAN, numbers JSON",
        "costs": "namespace VARCHAR, dataset VARCHAR, seconds DOUBLE, gpu_hours DOUBLE, dollars DOUBLE, joules DOUBLE, "
        "goodput DOUBLE, restarts BIGINT, rewinds BIGINT, skipped_updates BIGINT",
        "environments": "namespace VARCHAR, dataset VARCHAR, commit VARCHAR, dirty BOOLEAN, python VARCHAR, "
        "versions JSON, hardware JSON",
    }.items():
        connection.execute(f"CREATE TABLE {table} ({columns})")


def _4_scores_name_their_model(connection: duckdb.DuckDBPyConnection) -> None:
    """A run, or a model that was not trained here, which has no run."""
    connection.execute("ALTER TABLE scores ADD COLUMN model VARCHAR")


def _5_metrics_grow(connection: duckdb.DuckDBPyConnection) -> None:
    """How far the lines of a run's metrics are taken in: while it trains, only what was appended is read."""
    connection.execute("ALTER TABLE ingested ADD COLUMN size BIGINT")
    connection.execute("ALTER TABLE ingested ADD COLUMN last VARCHAR")


def _rename(connection: duckdb.DuckDBPyConnection, table: str, **columns: str) -> None:
    for old, new in columns.items():
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")


Migration = Callable[[duckdb.DuckDBPyConnection], None]
MIGRATIONS: tuple[Migration, ...] = (
    _1_outputs,
    _2_names_of_openlineage,
    _3_runs_checks_costs_environments,
    _4_scores_name_their_model,
    _5_metrics_grow,
)
VERSION = len(MIGRATIONS)


def version(connection: duckdb.DuckDBPyConnection) -> int:
    """Of the index that is open; 0 for a file without one."""
    try:
        found = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    except duckdb.CatalogException:
        return 0
    return int(found[0] or 0) if found else 0


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Bring the index to VERSION, empty where it was not there yet."""
    found = version(connection)
    if found == VERSION:
        return
    if found == 0 or found > VERSION:  # nothing that this version knows
        for (table,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
            connection.execute(f'DROP TABLE "{table}"')
        connection.execute("CREATE TABLE schema_version (version INTEGER)")
        found = 0
    for migrate in MIGRATIONS[found:]:
        migrate(connection)
    for table in (*TABLES, INGESTED, "schema_version"):
        connection.execute(f"DELETE FROM {table}")
    connection.execute("INSERT INTO schema_version VALUES (?)", [VERSION])
