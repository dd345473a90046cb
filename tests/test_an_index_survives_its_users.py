"""An index takes many writers, long readers, other programs, damage and older versions, and loses nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from test_lineage_answers_from_records import make, make_chain

from storage import lineage_schema as schema
from storage.lineage import Lineage

WRITERS = 8


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def lineage(tmp_path, store):
    make_chain(store)
    made = Lineage(tmp_path / "home" / "lineage.duckdb", store)
    made.ingest(store)
    return made


def count(lineage: Lineage) -> int:
    return lineage.sql("SELECT count(*) FROM artifacts")[1][0][0]


def end_a_stage(store: str, path: Path, worker: int, ready) -> None:
    ready.wait()
    for number in range(2):
        made = make(store, f"corpora/w{worker}-{number}/documents", "documents")
        Lineage(path).add(store, made.key)
        Lineage(path).sql("SELECT count(*) FROM artifacts")


@pytest.mark.slow
def test_stages_that_end_at_once_all_count(store, lineage):
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(WRITERS)
    writers = [context.Process(target=end_a_stage, args=(store, lineage.path, w, ready)) for w in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0] * WRITERS
    assert count(lineage) == 6 + 2 * WRITERS
    assert lineage.ingest(store) == 0


@pytest.mark.parametrize("read_only", [True, False])
def test_a_reader_holds_nobody_up(store, lineage, read_only):
    """As long as it likes, and with DuckDB's own shell or a notebook, which open a file to write."""
    code = f"import duckdb; c = duckdb.connect({str(lineage.path)!r}, read_only={read_only}); print('open'); input()"
    reader = subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout and reader.stdout.readline() == "open\n"
    lineage.add(store, make(store, "corpora/d/documents", "documents").key)
    assert count(lineage) == 7
    reader.communicate("\n")


def test_what_a_shell_has_written_into_an_index_is_dropped_with_it(store, lineage):
    """Its log of changes lies beside the file that has taken the index's name meanwhile, and is of another."""
    code = (
        f"import duckdb; c = duckdb.connect({str(lineage.path)!r}); c.execute('CREATE TABLE mine AS SELECT 1'); "
        "print('open'); input(); c.execute('CREATE TABLE more AS SELECT 1'); print('written'); input()"
    )
    shell = subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdin and shell.stdout and shell.stdout.readline() == "open\n"
    lineage.add(store, make(store, "corpora/d/documents", "documents").key)
    assert count(lineage) == 7
    shell.stdin.write("\n")
    shell.stdin.flush()
    assert shell.stdout.readline() == "written\n"
    assert count(lineage) == 7
    lineage.add(store, make(store, "corpora/e/documents", "documents").key)
    shell.kill()
    shell.wait()
    assert count(lineage) == 8 and lineage.ingest(store) == 0


def test_a_log_of_changes_that_was_left_behind_hinders_nobody(store, lineage):
    log = Path(f"{lineage.path}.wal")
    code = (
        f"import duckdb, os; c = duckdb.connect({str(lineage.path)!r}); "
        "c.execute('CREATE TABLE mine AS SELECT 1'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code])
    left = log.read_bytes()
    lineage.path.unlink()  # and is another file now
    Lineage(lineage.path).ingest(store)
    for ask in (
        lambda: lineage.add(store, "runs/demo"),
        lambda: lineage.ingest(store),
        lambda: lineage.impact("runs/demo"),
    ):
        log.write_bytes(left)
        ask()
    assert count(lineage) == 6 and lineage.ancestry("runs/demo").inputs[0].key == "tokens/c"


def test_a_writer_that_is_killed_leaves_the_index_as_it_was(store, lineage):
    code = (
        f"import os, signal; from pathlib import Path; from storage import lineage; "
        f"lineage._insert = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        f"lineage.Lineage(Path({str(lineage.path)!r})).add({store!r}, 'runs/demo')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert count(lineage) == 6
    lineage.add(store, "runs/demo")
    assert {p.name for p in lineage.path.parent.iterdir()} == {"lineage.duckdb", "lineage.lock"}


def damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        start = 0 if how == "head" else 3 * 4096
        data[start:] = bytes(255 - byte for byte in data[start:])
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["deleted", "cut", "head", "blocks"])
def test_a_damaged_index_costs_a_rebuild(store, lineage, how):
    damage(lineage.path, how)
    lineage.add(store, make(store, "corpora/d/documents", "documents").key)  # a stage of a run that goes on
    lineage.ingest(store)  # the run's end
    assert count(lineage) == 7


QUESTIONS = {
    "ancestry": lambda index: index.ancestry("runs/demo/scores/hellaswag"),
    "impact": lambda index: index.impact("corpora/c/documents"),
    "cost": lambda index: index.cost("runs/demo"),
    "outputs": lambda index: index.outputs("token_shards.bin"),
    "made_from": lambda index: index.made_from("tokens/c"),
    "sql": lambda index: index.sql("SELECT * FROM artifacts JOIN edges ON name = output ORDER BY ALL"),
    "documents": lambda index: index.sql("SELECT count(*) FROM documents", [index.store]),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_is_answered_by_a_damaged_index(store, lineage, question):
    before = QUESTIONS[question](lineage)
    damage(lineage.path, "blocks")
    assert QUESTIONS[question](lineage) == before


@pytest.mark.slow
def test_whichever_block_is_damaged_a_query_is_answered(store, lineage):
    """Also where the damage is seen by the query alone, and by nothing before it."""
    before, whole = QUESTIONS["sql"](lineage), lineage.path.read_bytes()
    for start in range(0, len(whole), 2**18):
        data = bytearray(whole)
        data[start : start + 2**14] = bytes(255 - byte for byte in data[start : start + 2**14])
        lineage.path.write_bytes(data)
        lineage.ingest(store)
        assert QUESTIONS["sql"](lineage) == before


def test_a_wrong_query_leaves_the_index_alone(lineage):
    def state() -> tuple[int, int, int]:
        found = lineage.path.stat()  # without the time of the last read
        return found.st_ino, found.st_size, found.st_mtime_ns

    before = state()
    for query in (
        "",
        "SELECT 1; SELECT 2",
        "SELECT nothing FROM artifacts",
        "SELEC",
        "SELECT * FROM nothing",
        "SELECT 1 / 'a'",
    ):
        with pytest.raises(ValueError, match="can't be answered"):
            lineage.sql(query)
    assert state() == before


def test_an_index_of_an_older_version_is_filled_anew(store, lineage):
    lineage.path.unlink()
    with duckdb.connect(str(lineage.path)) as connection:
        schema.MIGRATIONS[0](connection)
        connection.execute("CREATE TABLE schema_version AS SELECT 1 AS version")
        connection.execute("INSERT INTO scores VALUES (?, 'runs/old', 'old', 's', 'acc', 1, 1, 1)", [store])
    assert lineage.sql("SELECT count(*) FROM scores")[1] == [(0,)]  # nothing old is read
    assert lineage.ingest(store) == 6
    assert lineage.sql("SELECT dataset, value FROM scores")[1] == [("runs/demo/scores/hellaswag", 0.29)]


def test_an_index_of_a_newer_version_is_made_anew(store, lineage):
    with duckdb.connect(str(lineage.path)) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
        connection.execute("DROP TABLE scores")
    assert lineage.ingest(store) == 6
    assert count(lineage) == 6


def test_each_migration_leads_to_the_next_version(tmp_path):
    """Step by step or at once, the tables are the same."""
    shapes = []
    for start in range(schema.VERSION + 1):
        with duckdb.connect(str(tmp_path / f"{start}.duckdb")) as connection:
            for migrate in schema.MIGRATIONS[:start]:
                migrate(connection)
            if start:
                connection.execute("CREATE TABLE schema_version AS SELECT ? AS version", [start])
            schema.prepare(connection)
            columns = "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal"
            shapes.append(connection.execute(f"{columns} AND table_name <> 'schema_version' ORDER BY ALL").fetchall())
    assert all(shape == shapes[0] for shape in shapes)
    assert {name for name, _, _ in shapes[0]} == {*schema.TABLES, schema.INGESTED}
