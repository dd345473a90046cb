"""`gpt2 run` makes every stage, reuses what is there, and reruns only the evals when asked to."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from tiny_pipeline import ROOT, TINY_SETTINGS, Finished, gpt2

from storage import records, shards, tokenizer

STAGES = [
    "documents",
    "token_shards",
    "eval_items",
    "trained_model",
    "hf_model",
    "samples",
    "completion_demo",
    "eleuther",
    "validation_loss",
    "inspection",
    "report",
]


def by_asset(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {output["asset"]: output for output in answer["outputs"]}


def test_every_stage_is_made_and_recorded(finished: Finished) -> None:
    outputs = by_asset(finished.answer)
    assert sorted(outputs) == sorted(STAGES)
    for output in outputs.values():
        record = records.read_record(finished.store, output["key"])
        assert record is not None
        assert not output["reused"]
        assert record.versions["python"]
        assert record.cost["seconds"] > 0
        for file in record.files:
            assert records.file_problem(finished.store, record.key, file) is None


def test_shards_hold_the_documents_text(finished: Finished) -> None:
    """decode(shards) = text: the first document of the corpus stands at the head of the validation shard."""
    documents = records.read_record(finished.store, "corpora/" + corpus(finished) + "/documents")
    assert documents is not None
    first = pq.read_table(f"{finished.store}/{documents.key}/{documents.files[0].path}")["text"][0].as_py()
    shard = shards.open_shard(shards.shard_paths(f"{finished.store}/tokens/{corpus(finished)}", "val")[0])
    ends = (shard == tokenizer.EOT).nonzero()[0]
    assert ends[0] == 0
    assert tokenizer.decode(shard[1 : ends[1]]) == first


def corpus(finished: Finished) -> str:
    return by_asset(finished.answer)["token_shards"]["key"].removeprefix("tokens/")


def test_main_log_holds_llm_cs_lines_and_nothing_else(finished: Finished) -> None:
    lines = Path(finished.store, "runs/tiny/main.log").read_text().splitlines()
    training = [line for line in lines if re.fullmatch(r"s:\d+ trl:[\d.]+ lr:\d\.\d+e-\d+ norm:[\d.]+", line)]
    validation = [line for line in lines if re.fullmatch(r"s:\d+ tel:[\d.]+", line)]
    assert [int(line.split()[0][2:]) for line in training] == [0, 1, 2, 3, 4, 5]
    assert [int(line.split()[0][2:]) for line in validation] == [0, 3, 6]
    assert len(lines) == len(training) + len(validation)


def test_scores_are_computed_for_every_item(finished: Finished) -> None:
    items = by_asset(finished.answer)["eval_items"]
    for suite, wanted in (("completion_demo", 12), ("eleuther", 8)):
        page = json.loads(Path(finished.store, f"runs/tiny/scores/{suite}.json").read_text())
        assert page["items"] == wanted
        assert all(math.isfinite(score["value"]) for score in page["scores"].values())
    assert items["key"].startswith("eval_items/completion_demo-embedded")


def test_hellaswag_stands_unmade_without_its_items(finished: Finished) -> None:
    assert records.read_record(finished.store, "runs/tiny/scores/hellaswag") is None


def test_dagster_remembers_the_run_its_checks_and_its_metadata(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", finished.environment["DAGSTER_HOME"])
    with dg.DagsterInstance.get() as instance:
        run = instance.get_run_by_id(finished.answer["dagster_run"])
        assert run is not None and run.is_success
        assert "tiny" in instance.get_dynamic_partitions("run")
        for name in STAGES:
            event = instance.get_latest_materialization_event(dg.AssetKey(name))
            assert event is not None and event.asset_materialization is not None
            assert event.asset_materialization.partition == "tiny"
            assert {"fingerprint", "reused", "location"} <= set(event.asset_materialization.metadata)
        assert instance.get_latest_materialization_event(dg.AssetKey("hellaswag")) is None
        evaluations = [
            e.dagster_event.asset_check_evaluation_data
            for e in instance.all_logs(run.run_id)
            if e.dagster_event and e.dagster_event.event_type_value == "ASSET_CHECK_EVALUATION"
        ]
        blocking = {(e.asset_key.to_user_string(), e.passed) for e in evaluations if e.blocking}
        unscored = {("hellaswag", False), ("core", False)}
        assert (
            blocking == {(name, True) for name in STAGES if name not in ("inspection", "report", "samples")} | unscored
        )
        looked_at = {e.check_name: e.metadata for e in evaluations if not e.blocking}
        assert looked_at["eval_items_are_absent"]["completion_demo_items"].value == 12
        assert looked_at["documents_are_distinct"]["documents"].value == 560
        assert {"validation_is_held_out", "documents_have_tokens"} <= set(looked_at)


def test_the_look_at_the_corpus_is_kept_beside_the_tokens_and_shown(finished: Finished) -> None:
    found = by_asset(finished.answer)["inspection"]
    tokens = by_asset(finished.answer)["token_shards"]
    assert found["key"].startswith(f"{tokens['key']}/inspection-")
    record, shards_record = (records.read_record(finished.store, o["key"]) for o in (found, tokens))
    assert record is not None and shards_record is not None
    assert record.metrics["tokens"] == shards_record.tokens
    assert {p.key for p in record.parents} >= {tokens["key"], by_asset(finished.answer)["eval_items"]["key"]}
    page = Path(finished.store, "runs/tiny/report/index.html").read_text()
    assert "Held out, met again" in page and "Examples of words in common" in page
    report = records.read_record(finished.store, "runs/tiny/report")
    assert report is not None and found["key"] in {p.key for p in report.parents}


def test_documents_are_named_by_their_place_in_the_store(finished: Finished) -> None:
    """So that two stores of one corpus hold the same bytes; verification finds the text all the same."""
    folder = Path(finished.store, "tokens", corpus(finished))
    index = pq.read_table(next(folder.glob("*_train_000001.documents.parquet")))
    assert set(index["file"].to_pylist()) == {f"corpora/{corpus(finished)}/documents/000_00000.parquet"}
    record = records.read_record(finished.store, f"tokens/{corpus(finished)}")
    assert record is not None
    found = record.checks["shards_are_whole"]
    assert found["passed"] and found["compared"] == 50 and found["documents"] == record.rows == 560


@pytest.mark.slow
def test_a_second_run_reuses_everything_and_says_why(finished: Finished, tmp_path: Path) -> None:
    again = gpt2("run", "--name", "tiny", *TINY_SETTINGS, "--store", finished.store, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for output in json.loads(again.stdout)["outputs"]:
        assert output["reused"], output
        assert "same fingerprint" in output["reason"]


@pytest.mark.slow
def test_only_evals_scores_anew_and_touches_nothing_else(finished: Finished, tmp_path: Path) -> None:
    stamp = Path(finished.store, "runs/tiny/export/record.json").stat().st_mtime_ns
    before = json.loads(Path(finished.store, "runs/tiny/scores/completion_demo.json").read_text())["scores"]
    done = gpt2("evals", "tiny", "--store", finished.store, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = by_asset(json.loads(done.stdout))
    assert sorted(outputs) == ["completion_demo", "eleuther", "report", "validation_loss"]
    assert not any(output["reused"] for output in outputs.values())
    assert outputs["completion_demo"]["metrics"]["scores"] == before
    assert Path(finished.store, "runs/tiny/export/record.json").stat().st_mtime_ns == stamp


def test_dagsters_own_commands_find_the_instance_of_a_fresh_machine(tmp_path: Path) -> None:
    """As docs/running.md has it, before anything else has run there."""
    ours, theirs = f"{sys.executable} -m pipeline.commands.main", f"{sys.executable} -m dagster"
    script = f'eval "$({ours} env --store {tmp_path}/store)" && {theirs} instance concurrency get gpu'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_any_recipe_runs_on_a_folder_of_parquet(finished: Finished, tmp_path: Path) -> None:
    """Two ranks over gloo, and a corpus that stays where it is."""
    folder = Path(finished.store, "corpora", corpus(finished), "documents")
    settings = [*TINY_SETTINGS, "--set", "train.dtype=fp32", "--set", "shard_tokens=30000"]
    store = str(tmp_path / "store")
    done = gpt2(
        *("run", "gpt2-124m", "--corpus", str(folder), "--gpus", "2", *settings, "--store", store, "--json"),
        *("--only", "data", "--only", "training"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["run"].startswith("gpt2-124m-")
    outputs = by_asset(answer)
    assert outputs["token_shards"]["key"].startswith("tokens/documents-")
    documents = records.read_record(store, outputs["documents"]["key"])
    assert documents is not None and documents.files[0].path == str(folder / "000_00000.parquet")
