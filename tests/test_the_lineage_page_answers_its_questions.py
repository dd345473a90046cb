"""docs/lineage.md tells the truth: its ten queries run on a finished store, its tables are the index's."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_pipeline import ROOT, gpt2

from storage.lineage import Lineage
from storage.places import places

PAGE = (ROOT / "docs" / "lineage.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def lineage(finished) -> Lineage:
    found = Lineage(places(finished.store).lineage, finished.store)
    found.ingest(finished.store)
    return found


def test_there_are_ten():
    assert len(QUERIES) == 10


@pytest.mark.parametrize("number", range(1, 11))
def test_each_query_runs(lineage, finished, number):
    columns, rows = lineage.sql(QUERIES[number - 1], [finished.store])
    assert columns
    assert bool(rows) == (number != 8)  # nothing was replaced in a store that was made at once


def test_the_tables_are_those_of_the_index(lineage, finished):
    described = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([\w, ]+) \|$", PAGE, re.MULTILINE))
    assert set(described) == {
        *("artifacts", "files", "edges", "runs", "metrics", "scores", "checks", "costs", "environments", "documents")
    }
    for table, columns in described.items():
        assert lineage.sql(f"SELECT * FROM {table} LIMIT 0", [finished.store])[0] == columns.split(", ")


def test_the_command_answers_as_the_page_shows(finished, tmp_path):
    done = gpt2("lineage", "sql", QUERIES[0], "--store", finished.store, "--json", cwd=tmp_path)
    assert [row["model"] for row in json.loads(done.stdout)] == ["tiny"]
    shown = gpt2("lineage", "show", "tiny/scores/completion_demo", "--store", finished.store, cwd=tmp_path).stdout
    for part in ("documents", "token_shards", "trained_model", "sha256", "000_00000.parquet"):
        assert part in shown


def test_a_document_is_followed_to_models_and_scores(finished, tmp_path):
    """The longest of step 3: what was seen, when, its text, and what depends on it."""
    ask = lambda *words: gpt2("lineage", *words, "--store", finished.store, "--json", cwd=tmp_path)  # noqa: E731
    seen = json.loads(ask("trace", "tiny", "--step", "3", "--text").stdout)
    assert all(row["text"] for row in seen)
    steps = json.loads(ask("trace", "tiny", "--document", seen[0]["url"]).stdout)
    assert 3 in [row["step"] for row in steps] and steps[0]["id"] == seen[0]["id"]
    reached = {row["output"] for row in json.loads(ask("impact", seen[0]["id"]).stdout)}
    assert {"runs/tiny", "runs/tiny/export", "runs/tiny/scores/validation_loss"} <= reached
    held_out = "SELECT id FROM documents WHERE shard LIKE '%_val_%' AND start + tokens < 10000 LIMIT 1"
    document = json.loads(ask("sql", held_out).stdout)[0]["id"]
    reached = {row["output"] for row in json.loads(ask("impact", document).stdout)}
    assert "runs/tiny/scores/validation_loss" in reached and "runs/tiny" not in reached


def test_the_index_lies_in_the_home_and_nothing_else_is_left(finished):
    home = Path(places(finished.store).home)
    assert {p.name for p in home.iterdir() if "lineage" in p.name} == {"lineage.duckdb", "lineage.lock"}


def test_two_runs_are_told_apart_by_data_code_configuration_and_environment(finished, tmp_path):
    """A copy of the run whose records say that it was made otherwise."""
    store = tmp_path / "store"
    shutil.copytree(finished.store, store)
    shutil.copytree(store / "runs/tiny", store / "runs/other")
    for path in (store / "runs/other").rglob("*record.json"):
        record = json.loads(path.read_text().replace("runs/tiny", "runs/other"))
        record |= {"commit": "f" * 40, "versions": record["versions"] | {"torch": "1.0"}}
        record |= {"code_version": "0"} if path.name == "eleuther.record.json" else {}
        path.write_text(json.dumps(record))
    config = json.loads((store / "runs/other/config.json").read_text())
    config["train"]["lr"] /= 2
    (store / "runs/other/config.json").write_text(json.dumps(config))
    done = gpt2("compare", "tiny", "other", "--store", str(store), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = {(d["area"], d["key"]): (d["left"], d["right"]) for d in told["differences"]["other"]}
    assert found["configuration", "train.lr"] == ("0.005", "0.0025")
    assert found["environment", "torch"][1] == "1.0"
    assert found["code", "commit"][1].startswith("ffffffffffff")
    assert not any(area == "data" for area, _ in found)
    assert {(s["suite"], s["verdict"]) for s in told["scores"]} == {
        ("validation_loss", "equal"),
        ("completion_demo", "equal"),
    }
    assert told["outdated"] == {"tiny": [], "other": ["eleuther"]}
    shown = gpt2("compare", "tiny", "other", "--store", str(store), cwd=tmp_path).stdout
    assert "`gpt2 evals other --suite eleuther` scores anew" in " ".join(shown.split())
