"""The index says what came from what, is rebuilt from records alone, and lets many processes write."""

import json
import os
from pathlib import Path

import pytest
from tiny_pipeline import gpt2

from pipeline.commands.lineage import sql
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


def test_a_path_from_here_names_its_output(store, lineage, monkeypatch):
    make_chain(store)
    outside = f"{store}/data/a.parquet"
    files = [File(outside, 1, "1", "ab")]
    records.write_record(
        store, Record("documents", "corpora/o/documents", "f", "1", {}, [], files, *["2026-11-24"] * 2)
    )
    lineage.ingest(store)
    monkeypatch.chdir(Path(store).parent)
    assert lineage.ancestry("store/runs/demo/export/hf_model.bin").key == "runs/demo/export"
    assert lineage.ancestry("./store/runs/demo/").key == "runs/demo"
    assert lineage.outputs("store/data/a.parquet") == ["corpora/o/documents"]


@pytest.mark.parametrize("name", ["embedded", "c-1.0", "corpora/c-1.0", "corpora/c-1.0/documents"])
def test_a_corpus_is_known_by_its_name(store, lineage, name):
    documents = make(store, "corpora/c-1.0/documents", "documents")
    make(store, "tokens/t", "token_shards", documents)
    config = {"recipe": "demo", "corpus": "embedded", "train": {"steps": 2, "batch_tokens": 64}}
    objects.publish_json(f"{store}/runs/demo/config.json", config)
    objects.publish_json(f"{store}/runs/demo/inputs.json", {"documents": documents.key, "tokens": "tokens/t"})
    lineage.ingest(store)
    assert lineage.outputs(name) == [documents.key]
    assert [node.key for node in lineage.impact(name)] == ["tokens/t"]


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


def test_the_revision_on_the_hub_and_the_files_are_told(store, lineage):
    details = {"url": "https://huggingface.co/datasets/a/b", "revision": "abc123", "text_bytes": 5}
    make(store, "corpora/c/documents", "documents", metrics=details)
    lineage.ingest(store)
    node = lineage.ancestry("corpora/c/documents")
    assert (node.facts["url"], node.facts["revision"]) == (details["url"], "abc123")
    assert node.files == ({"path": "documents.bin", "bytes": 10, "sha256": "ab" * 32},)


def test_what_was_changed_since_is_named():
    record = Record(
        "a", "k", "f", "1", {"train": {"lr": 0.1, "steps": 5}, "gone": 1}, [Parent("p", "1" * 64)], [], "", ""
    )
    now = ("2", {"train": {"lr": 0.2, "steps": 5}, "new": [1, 2]}, [Parent("p", "2" * 64)])
    assert records.changes(record, *now)[:3] == ["code version 1 → 2", "train.lr 0.1 → 0.2", "gone 1 → none"]
    assert records.changes(record, *now)[3].startswith("new none → 2 of digest ")
    assert records.changes(record, *now)[4:] == ["p 11111111 → 22222222"]


def test_only_changes_are_taken_in(store, lineage, monkeypatch):
    parents = make_chain(store)
    lineage.ingest(store)
    assert lineage.ingest(store) == 0
    make(store, "runs/demo/report", "report", parents["model"])
    objects.remove(records.record_url(store, "runs/demo/scores/hellaswag"))
    assert lineage.ingest(store) == 2
    assert lineage.sql("SELECT count(*) FROM scores")[1] == [(0,)]
    assert lineage.sql("SELECT count(*) FROM artifacts")[1] == [(6,)]


EVERYTHING = "SELECT * FROM artifacts ORDER BY name"


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
    make(store, "models/gpt2-xl-0123abcd/hellaswag", "hellaswag", metrics={"scores": {"acc": {"value": 0.4, "n": 9}}})
    lineage.ingest(store)
    assert lineage.sql("SELECT model, run FROM scores ORDER BY value")[1] == [("demo", "demo"), ("gpt2-xl", None)]
    metrics = dict(lineage.sql("SELECT name, value FROM metrics WHERE dataset = 'runs/demo'")[1])
    assert metrics == {"val_loss": 3.25, "speed.mfu": 0.5}


def test_two_stores_share_an_index(tmp_path, store, lineage):
    other = str(tmp_path / "other")
    make_chain(store)
    make(other, "corpora/d/documents", "documents")
    lineage.ingest(store)
    lineage.ingest(other)
    assert lineage.rebuild(other) == 1
    assert lineage.sql("SELECT namespace, count(*) FROM artifacts GROUP BY namespace ORDER BY 2")[1] == [
        (other, 1),
        (store, 6),
    ]


def test_a_query_is_answered_of_the_store_that_is_asked(tmp_path, store, lineage):
    """A copy of it counts in all of the database alone; one that was moved away is forgotten."""
    other = str(tmp_path / "other")
    make_chain(store)
    objects.copy_tree(store, other)
    asked = [Lineage(lineage.path, one) for one in (store, other)]
    for index in asked:
        index.ingest(index.store)
    for index in asked:
        assert index.sql("SELECT count(*) FROM artifacts a JOIN edges e ON a.name = e.output")[1] == [(5,)]
        assert index.sql("SELECT DISTINCT namespace FROM files")[1] == [(index.store,)]
        assert index.sql("SELECT count(*) FROM lineage.artifacts")[1] == [(12,)]
    moved = str(tmp_path / "moved")
    os.rename(other, moved)
    Lineage(lineage.path, moved).ingest(moved)
    every = "SELECT DISTINCT namespace FROM artifacts ORDER BY 1"
    assert lineage.sql(every)[1] == [(moved,), (store,)]
    os.rename(moved, other)
    lineage.rebuild(store)
    assert lineage.sql(every)[1] == [(store,)]


def test_a_store_on_s3_is_indexed(lineage, s3_store):
    store = f"{s3_store}/lineage"
    make_chain(store)
    assert lineage.ingest(store) == 6
    assert lineage.ingest(store) == 0
    assert lineage.ancestry(f"{store}/runs/demo").inputs[0].key == "tokens/c"


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO metrics VALUES ('s', 'k', 'n', 1, 1)",
        "DELETE FROM artifacts",
        "DROP TABLE files",
        "SELECT 1; DELETE FROM artifacts",
        "COPY artifacts TO '{tmp}/stolen.csv'",
        "SELECT * FROM read_text('{tmp}/secret')",
        "ATTACH '{tmp}/other.duckdb'",
        "SET enable_external_access = true",
        "EXPLAIN ANALYZE COPY artifacts TO '{tmp}/stolen.csv'",
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


def test_a_query_may_join_by_a_column_that_is_named_once(store, lineage):
    make_chain(store)
    lineage.ingest(store)
    made = "WITH made(name) AS (SELECT name FROM artifacts WHERE job = 'documents') SELECT job FROM made "
    assert Lineage(lineage.path, store).sql(f"{made} JOIN artifacts USING (name)")[1] == [("documents",)]


@pytest.mark.parametrize(
    "named", ["artifacts, documents", '"documents"', "artifacts a JOIN Documents d ON a.name = url"]
)
def test_however_a_query_names_the_documents_they_are_shown(store, lineage, named):
    make_chain(store)
    lineage.ingest(store)
    assert lineage.sql(f"SELECT count(*) FROM {named}; ", [store])[1] == [(0,)]


def test_an_unknown_key_gets_the_nearest(store, lineage):
    with pytest.raises(ValueError, match="nothing has been made here yet"):
        lineage.ancestry("runs/demo")
    make_chain(store)
    lineage.ingest(store)
    with pytest.raises(ValueError, match="no output or file 'runs/dmeo': did you mean runs/demo,"):
        lineage.ancestry("runs/dmeo")
    other = f"{store}-2"  # which has the same names, and one that is nearer
    make_chain(other)
    make(other, "runs/dmeo2", "trained_model")
    lineage.ingest(other)
    with pytest.raises(ValueError, match="did you mean runs/demo, runs/demo/export, runs/demo/scores/hellaswag"):
        Lineage(lineage.path, store).ancestry("runs/dmeo")
    with pytest.raises(ValueError, match="did you mean runs/dmeo2, runs/demo, runs/demo/export"):
        Lineage(lineage.path).ancestry("runs/dmeo")
    told = gpt2("lineage", "impact", "runs/dmeo", "--store", store, cwd=Path(store))
    assert told.returncode == 2 and "did you mean runs/demo," in told.stderr


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


def test_a_file_name_that_several_outputs_have_means_all_of_them(store, lineage, tmp_path):
    make_chain(store)
    other = make(store, "tokens/d", "token_shards")  # each holds token_shards.bin
    make(store, "runs/more", "trained_model", other)
    lineage.ingest(store)
    assert lineage.outputs("token_shards.bin") == ["tokens/c", "tokens/d"]
    assert lineage.outputs("runs/demo/scores/hellaswag.bin") == ["runs/demo/scores/hellaswag"]
    assert lineage.outputs("runs/hf_model.bin") == []
    with pytest.raises(ValueError, match="'token_shards.bin' may mean 2 outputs: name one of tokens/c, tokens/d"):
        Lineage(lineage.path, store).ancestry("token_shards.bin")
    told = gpt2("lineage", "impact", "token_shards.bin", "--store", store, "--json", cwd=tmp_path)
    assert {row["output"]: row["made from"] for row in json.loads(told.stdout)} == {
        **{"runs/demo": "tokens/c", "runs/demo/export": "tokens/c", "runs/demo/scores/hellaswag": "tokens/c"},
        **{"runs/more": "tokens/d"},
    }


def test_an_answer_is_shown_as_it_is(store, capsys):
    """Brackets are no colours, and of two columns of one name none is lost."""
    Path(store).mkdir()
    query = "SELECT '[/x] and [draft]' AS a, 1 AS a"
    sql(query, store)
    shown = capsys.readouterr().out
    assert "[/x] and [draft]" in shown and "a_1" in shown
    sql(query, store, as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"a": "[/x] and [draft]", "a_1": 1}]


def test_the_cost_of_a_score_counts_each_output_once(store, lineage):
    documents = make(store, "corpora/c/documents", "documents", cost={"seconds": 5.0})
    tokens = make(store, "tokens/c", "token_shards", documents, cost={"seconds": 10.0})
    model = make(store, "runs/r", "trained_model", tokens, documents, cost={"seconds": 60.0, "gpu_hours": 0.5})
    make(store, "runs/r/scores/s", "s", model, tokens, cost={"seconds": 7.0, "gpu_hours": 0.1, "dollars": 2.0})
    make(store, "runs/other", "trained_model", tokens, cost={"seconds": 1000.0})
    lineage.ingest(store)
    costs = lineage.cost("runs/r/scores/s")
    assert [c.key for c in costs] == ["runs/r/scores/s", "runs/r", "tokens/c", "corpora/c/documents"]
    assert [(c.seconds, c.gpu_hours) for c in costs] == [(7.0, 0.1), (60.0, 0.5), (10.0, None), (5.0, None)]  # never 0


def test_the_cost_of_a_run_is_that_of_all_its_stages(store, lineage):
    tokens = make(store, "tokens/c", "token_shards", cost={"seconds": 10.0})
    model = make(store, "runs/r", "trained_model", tokens, cost={"seconds": 60.0})
    export = make(store, "runs/r/export", "hf_model", model, cost={"seconds": 6.0})
    items = make(store, "eval_items/i", "eval_items", cost={"seconds": 3.0})
    score = make(store, "runs/r/scores/s", "s", export, items, cost={"seconds": 7.0})
    looked = make(store, "tokens/c/inspection-1", "inspection", tokens, cost={"seconds": 4.0})
    other = make(store, "runs/other", "trained_model", tokens, cost={"seconds": 1000.0})
    make(store, "runs/r/report", "report", model, score, looked, other, cost={"seconds": 2.0})  # beside the other
    lineage.ingest(store)
    stages = ["runs/r", "tokens/c", "runs/r/scores/s", "runs/r/export", "tokens/c/inspection-1", "eval_items/i"]
    stages += ["runs/r/report"]
    assert [c.key for c in lineage.cost("r")] == [c.key for c in lineage.cost("runs/r")] == stages
    assert [c.key for c in lineage.cost("runs/r/export")] == ["runs/r", "tokens/c", "runs/r/export"]


def test_a_runs_configuration_and_steps_are_rows(store, lineage):
    make_chain(store)
    config = {"recipe": "demo", "corpus": "c", "train": {"steps": 2, "batch_tokens": 64}}
    objects.publish_json(f"{store}/runs/demo/config.json", config)
    lines = b'{"step": 0, "loss": 3.5, "mfu": null}\n{"step": 1, "loss": 3.25, "health": {"h0": 1.5}}\n{"step": 2, "lo'
    objects.publish_bytes(f"{store}/runs/demo/metrics.jsonl", lines)
    lineage.ingest(store)
    steps = lineage.sql("SELECT step, name, value FROM metrics WHERE step IS NOT NULL ORDER BY ALL")[1]
    assert steps == [(0, "loss", 3.5), (1, "health.h0", 1.5), (1, "loss", 3.25)]  # what is half-written is left
    runs = "SELECT run, recipe, corpus, steps, batch_tokens, documents, tokens FROM runs"
    assert lineage.sql(runs)[1] == [("demo", "demo", "c", 2, 64, None, None)]
    objects.publish_json(f"{store}/runs/demo/inputs.json", {"documents": "corpora/c/documents", "tokens": "tokens/c"})
    assert lineage.ingest(store) == 1
    assert lineage.sql(runs)[1] == [("demo", "demo", "c", 2, 64, "corpora/c/documents", "tokens/c")]
    assert lineage.sql("SELECT count(*) FROM metrics WHERE step IS NULL")[1] == [(2,)]  # the record's are kept


def test_of_a_run_that_trains_only_new_steps_are_read(store, lineage, monkeypatch):
    path = Path(store, "runs/demo/metrics.jsonl")
    path.parent.mkdir(parents=True)
    steps = "SELECT step, name, value FROM metrics ORDER BY ALL"

    def write(mode: str, *lines: tuple[int, float], half: str = "") -> None:
        with open(path, mode) as file:
            file.write("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in lines) + half)
        lineage.ingest(store)

    write("w", (0, 3.5), (1, 3.25), half='{"step": 2, "lo')
    starts: list[int] = []
    read_bytes = objects.read_bytes
    monkeypatch.setattr(objects, "read_bytes", lambda url, at=0: starts.append(at) or read_bytes(url, at))
    write("a", half='ss": 3.0}\n')
    write("a", (3, 2.5))
    assert len(starts) == 2 and min(starts) > 0
    monkeypatch.undo()
    grown = [(0, "loss", 3.5), (1, "loss", 3.25), (2, "loss", 3.0), (3, "loss", 2.5)]
    assert lineage.sql(steps)[1] == grown
    write("w", (0, 3.5), (1, 3.0))  # cut back and begun again: shorter
    assert lineage.sql(steps)[1] == [(0, "loss", 3.5), (1, "loss", 3.0)]
    write("w", (0, 3.5), (1, 2.0), (2, 1.5))  # and longer
    assert lineage.sql(steps)[1] == [(0, "loss", 3.5), (1, "loss", 2.0), (2, "loss", 1.5)]
    lineage.rebuild(store)
    assert lineage.sql(steps)[1] == [(0, "loss", 3.5), (1, "loss", 2.0), (2, "loss", 1.5)]


def test_what_cannot_be_read_is_named_and_the_rest_answers(store, lineage, caplog):
    """Whether it was in the index before or not; mended, it is back."""
    make_chain(store)
    lineage.ingest(store)
    url = records.record_url(store, "runs/demo/scores/hellaswag")
    whole = objects.read_bytes(url)
    objects.publish_bytes(url, whole[:-30])
    objects.publish_json(f"{store}/corpora/d/documents/record.json", {"schema": 99})
    objects.publish_json(f"{store}/runs/demo/config.json", {"recipe": "demo", "corpus": "c", "train": {}})
    lineage.ingest(store)
    wrong = ["corpora/d/documents/record.json", "runs/demo/config.json", "runs/demo/scores/hellaswag.record.json"]
    assert [any(path in r.message for r in caplog.records) for path in wrong] == [True] * 3
    assert "it has no 'steps'" in caplog.text
    assert [n.key for n in lineage.impact("tokens/c")] == ["runs/demo", "runs/demo/export"]
    caplog.clear()
    assert lineage.ingest(store) == 0
    said = [r.message for r in caplog.records if r.name == "storage.lineage"]  # others' threads may log, too
    assert len(said) == 3  # at each question, until it is mended
    assert lineage.rebuild(store) == 5
    objects.publish_bytes(url, whole)
    assert lineage.ingest(store) == 1
    assert len(lineage.impact("tokens/c")) == 3


@pytest.mark.parametrize("change", [{"rows": "many"}, {"metrics": {"acc": {"value": 1, "stderr": "small"}}}])
def test_a_value_of_another_kind_costs_its_record_alone(store, lineage, caplog, change):
    make_chain(store)
    url = records.record_url(store, "eval_items/hellaswag")
    objects.publish_json(url, objects.read_json(url) | change)
    assert lineage.ingest(store) == 5 and "eval_items/hellaswag/record.json" in caplog.text
    assert len(lineage.impact("corpora/c/documents")) == 4


def test_a_copied_run_leaves_the_original_as_it_was(store, lineage, caplog):
    make_chain(store)
    lineage.ingest(store)
    before = lineage.sql(EVERYTHING), lineage.ancestry("runs/demo")
    objects.copy_tree(f"{store}/runs/demo", f"{store}/runs/copy")
    lineage.ingest(store)
    assert (lineage.sql(EVERYTHING), lineage.ancestry("runs/demo")) == before
    assert "runs/copy/record.json" in caplog.text and "it is the record of runs/demo" in caplog.text
    objects.remove_tree(f"{store}/runs/copy")
    lineage.ingest(store)
    assert (lineage.sql(EVERYTHING), lineage.ancestry("runs/demo")) == before


def test_checks_and_environments_are_rows(store, lineage):
    checked = {"loss_is_finite": {"passed": True, "loss": 3.25}}
    make(store, "runs/r", "trained_model", checks=checked, versions={"python": "3.12.1", "torch": "2.11.0"})
    lineage.ingest(store)
    assert lineage.sql("SELECT assertion, success, numbers ->> 'loss' FROM checks")[1] == [
        ("loss_is_finite", True, "3.25")
    ]
    environment = "SELECT commit, dirty, python, versions ->> 'torch' FROM environments"
    assert lineage.sql(environment)[1] == [("c0ffee", False, "3.12.1", "2.11.0")]


def test_one_output_is_taken_in_without_a_listing(store, lineage, monkeypatch):
    parents = make_chain(store)
    lineage.ingest(store)
    make(store, "runs/demo/report", "report", parents["model"])
    monkeypatch.setattr(objects, "list_files", None)
    lineage.add(store, "runs/demo/report")
    assert lineage.ancestry("runs/demo/report").inputs[0].key == "runs/demo"


def test_an_output_of_the_store_that_is_asked_about_is_meant(tmp_path, store, lineage):
    other = str(tmp_path / "other")
    make_chain(store)
    make(other, "runs/demo", "trained_model")
    lineage.ingest(store)
    lineage.ingest(other)
    assert [len(Lineage(lineage.path, one).ancestry("demo").inputs) for one in (store, other)] == [1, 0]
