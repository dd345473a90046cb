"""The index says what came from what, is rebuilt from records alone, and lets many processes write."""

import multiprocessing
from pathlib import Path

import duckdb
import pytest

from storage import objects, records
from storage.lineage import Lineage
from storage.records import File, Parent, Record


def make(store: str, key: str, asset: str, *parents: Parent, code_version: str = "1", **facts) -> Parent:
    mark = records.fingerprint(asset, code_version, {"key": key}, list(parents))
    record = Record(
        asset=asset,
        key=key,
        fingerprint=mark,
        code_version=code_version,
        config={"key": key},
        parents=list(parents),
        files=[File(f"{asset}.bin", 10, "1", "ab" * 32)],
        started="2026-11-24T10:00:00+00:00",
        ended="2026-11-24T10:01:00+00:00",
        commit="c0ffee",
        dirty=False,
        **facts,
    )
    records.write_record(store, record)
    return Parent(key, mark)


def make_chain(store: str) -> dict[str, Parent]:
    documents = make(store, "corpora/c/documents", "documents", rows=3)
    tokens = make(store, "tokens/c", "token_shards", documents, tokens=100)
    model = make(store, "runs/demo", "trained_model", tokens, metrics={"val_loss": 3.25, "speed": {"mfu": 0.5}})
    export = make(store, "runs/demo/export", "hf_model", model)
    items = make(store, "eval_items/hellaswag", "eval_items", rows=4)
    scores = {"scores": {"acc": {"value": 0.29, "stderr": 0.005, "n": 10042}}}
    make(store, "runs/demo/scores/hellaswag", "hellaswag", export, items, metrics=scores)
    return {"documents": documents, "tokens": tokens, "model": model}


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def lineage(tmp_path):
    return Lineage(tmp_path / "home" / "lineage.duckdb")


def chain(node) -> list[str]:
    """The jobs from an output down its first input."""
    return [node.job, *chain(node.inputs[0])] if node.inputs else [node.job]


def test_a_scores_ancestry_reaches_the_documents(store, lineage):
    make_chain(store)
    assert lineage.ingest(store) == 6
    score = lineage.ancestry("runs/demo/scores/hellaswag")
    by_key = {n.key: n for n in score.inputs}
    assert set(by_key) == {"runs/demo/export", "eval_items/hellaswag"}
    jobs = ["hf_model", "trained_model", "token_shards", "documents"]
    assert chain(by_key["runs/demo/export"]) == jobs
    assert by_key["runs/demo/export"].inputs[0].inputs[0].facts["tokens"] == 100
    assert score.facts["commit"] == "c0ffee" and score.facts["dirty"] is False


@pytest.mark.parametrize("name", ["tokens/c/token_shards.bin", "{store}/tokens/c/token_shards.bin", "{store}/tokens/c"])
def test_a_file_or_a_location_names_its_output(store, lineage, name):
    make_chain(store)
    lineage.ingest(store)
    assert lineage.ancestry(name.format(store=store)).key == "tokens/c"


def test_what_was_replaced_since_is_said(store, lineage):
    parents = make_chain(store)
    lineage.ingest(store)
    make(store, "tokens/c", "token_shards", parents["documents"], code_version="2")
    lineage.ingest(store)
    tokens = lineage.ancestry("runs/demo").inputs[0]
    assert tokens.replaced and tokens.fingerprint == parents["tokens"].fingerprint
    assert not lineage.ancestry("tokens/c").replaced


def test_an_input_whose_record_is_gone_is_said(store, lineage):
    make_chain(store)
    objects.remove(records.record_url(store, "corpora/c/documents"))
    lineage.ingest(store)
    documents = lineage.ancestry("tokens/c").inputs[0]
    assert documents.replaced and documents.job == "" and documents.key == "corpora/c/documents"


def test_only_changes_are_taken_in(store, lineage, monkeypatch):
    parents = make_chain(store)
    lineage.ingest(store)
    assert lineage.ingest(store) == 0
    make(store, "runs/demo/report", "report", parents["model"])
    objects.remove(records.record_url(store, "runs/demo/scores/hellaswag"))
    assert lineage.ingest(store) == 2
    assert lineage.sql("SELECT count(*) FROM scores")[1] == [(0,)]
    assert lineage.sql("SELECT count(*) FROM artifacts")[1] == [(6,)]


EVERYTHING = "SELECT * EXCLUDE (hardware, versions) FROM artifacts ORDER BY key"


def test_a_lost_index_is_rebuilt_from_the_records(store, lineage):
    make_chain(store)
    lineage.ingest(store)
    before = (
        lineage.sql(EVERYTHING),
        lineage.sql("SELECT * FROM edges ORDER BY ALL"),
        lineage.ancestry("runs/demo"),
    )
    lineage.path.unlink()
    assert lineage.rebuild(store) == 6
    after = (
        lineage.sql(EVERYTHING),
        lineage.sql("SELECT * FROM edges ORDER BY ALL"),
        lineage.ancestry("runs/demo"),
    )
    assert before == after
    assert lineage.rebuild(store) == 6 and lineage.sql(EVERYTHING) == before[0]


def test_numbers_and_scores_are_rows(store, lineage):
    make_chain(store)
    lineage.ingest(store)
    columns, rows = lineage.sql("SELECT run, suite, name, value, stderr, items FROM scores")
    assert columns == ["run", "suite", "name", "value", "stderr", "items"]
    assert rows == [("demo", "hellaswag", "acc", 0.29, 0.005, 10042)]
    metrics = dict(lineage.sql("SELECT name, value FROM metrics WHERE key = 'runs/demo'")[1])
    assert metrics == {"val_loss": 3.25, "speed.mfu": 0.5}


def test_two_stores_share_an_index(tmp_path, store, lineage):
    other = str(tmp_path / "other")
    make_chain(store)
    make(other, "corpora/d/documents", "documents")
    lineage.ingest(store)
    lineage.ingest(other)
    assert lineage.rebuild(other) == 1
    assert lineage.sql("SELECT store, count(*) FROM artifacts GROUP BY store ORDER BY 2")[1] == [
        (other, 1),
        (store, 6),
    ]


def test_a_store_on_s3_is_indexed(lineage, s3_store):
    store = f"{s3_store}/lineage"
    make_chain(store)
    assert lineage.ingest(store) == 6
    assert lineage.ingest(store) == 0
    assert lineage.ancestry(f"{store}/runs/demo").inputs[0].key == "tokens/c"


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO metrics VALUES ('s', 'k', 'n', 1)",
        "DELETE FROM artifacts",
        "DROP TABLE files",
        "SELECT 1; DELETE FROM artifacts",
        "COPY artifacts TO '{tmp}/stolen.csv'",
        "SELECT * FROM read_text('{tmp}/secret')",
        "ATTACH '{tmp}/other.duckdb'",
        "SET enable_external_access = true",
        "SELEC nothing",
    ],
)
def test_a_query_only_reads_the_index(store, lineage, tmp_path, query):
    make_chain(store)
    lineage.ingest(store)
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ValueError, match="can't be answered"):
        lineage.sql(query.format(tmp=tmp_path))
    assert lineage.sql("SELECT count(*) FROM artifacts")[1] == [(6,)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "secret", "store"]


def test_an_unknown_key_gets_the_nearest(store, lineage):
    with pytest.raises(ValueError, match="nothing has been made here yet"):
        lineage.ancestry("runs/demo")
    make_chain(store)
    lineage.ingest(store)
    with pytest.raises(ValueError, match="no output or file 'runs/dmeo': did you mean runs/demo,"):
        lineage.ancestry("runs/dmeo")


def test_what_a_fault_reaches(store, lineage):
    make_chain(store)
    lineage.ingest(store)
    reached = [(n.key, n.job) for n in lineage.impact("tokens/c")]
    assert reached == [
        ("runs/demo", "trained_model"),
        ("runs/demo/export", "hf_model"),
        ("runs/demo/scores/hellaswag", "hellaswag"),
    ]
    assert lineage.impact("runs/demo/scores/hellaswag") == []
    assert len(lineage.impact("corpora/c/documents")) == 4


def test_the_cost_of_a_score_counts_each_output_once(store, lineage):
    documents = make(store, "corpora/c/documents", "documents", cost={"seconds": 5.0})
    tokens = make(store, "tokens/c", "token_shards", documents, cost={"seconds": 10.0})
    model = make(store, "runs/r", "trained_model", tokens, documents, cost={"seconds": 60.0, "gpu_hours": 0.5})
    make(store, "runs/r/scores/s", "s", model, tokens, cost={"seconds": 7.0, "gpu_hours": 0.1, "dollars": 2.0})
    make(store, "runs/other", "trained_model", tokens, cost={"seconds": 1000.0})
    lineage.ingest(store)
    costs = lineage.cost("runs/r/scores/s")
    assert [c.key for c in costs] == ["runs/r/scores/s", "runs/r", "tokens/c", "corpora/c/documents"]
    assert (sum(c.seconds for c in costs), round(sum(c.gpu_hours for c in costs), 6)) == (82.0, 0.6)


def test_an_index_of_another_version_is_filled_anew(store, lineage):
    make_chain(store)
    lineage.ingest(store)
    with duckdb.connect(str(lineage.path)) as connection:
        connection.execute("UPDATE schema_version SET version = 0")
        connection.execute("DROP TABLE scores")
    assert lineage.ingest(store) == 6
    assert lineage.sql("SELECT count(*) FROM scores")[1] == [(1,)]


def write_and_ingest(store: str, path: Path, worker: int) -> None:
    for number in range(5):
        make(store, f"corpora/w{worker}-{number}/documents", "documents")
        Lineage(path).ingest(store)
        Lineage(path).sql("SELECT count(*) FROM artifacts")


def test_concurrent_writers_and_readers_lose_nothing(store, lineage):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_and_ingest, args=(store, lineage.path, w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    keys = lineage.sql("SELECT key FROM artifacts ORDER BY key")[1]
    assert keys == [(f"corpora/w{w}-{n}/documents",) for w in range(4) for n in range(5)]
    assert lineage.ingest(store) == 0
