"""A checkpoint that a run keeps is found by the sensor, scored once, and its score leads down to the documents."""

import os
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
import tiny_run
import torch
from dagster._core.definitions.partitions.context import partition_loading_context
from tiny_pipeline import Finished, copied

from assets.checkpoints import questions_of, run_with, scratch_of, unscored
from assets.corpus import completion_output
from assets.items import hellaswag_output
from assets.making import Maker, Output, Produced, StageConfig
from assets.models import scored_here
from assets.resources import Launcher, Silent
from pipeline import instance, sensors
from pipeline.definitions import build, defs
from pipeline.runs import silent_maker
from storage import objects, records
from storage.lineage import Lineage
from storage.places import Places, places
from training.config import to_dict
from training.weights import load_run


def test_what_a_killed_score_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    maker, key = Maker(Places(str(tmp_path), tmp_path), Launcher(), Silent()), "runs/r/checkpoint_scores/step_000002"
    with scratch_of(maker, key) as killed:
        pass
    Path(killed).mkdir()
    Path(killed, "model.safetensors").write_bytes(b"of one that never came to its end")
    with scratch_of(maker, key) as scratch:
        assert (scratch, list(Path(scratch).iterdir())) == (killed, [])
    assert not Path(scratch).exists()


@dg.job
def nothing() -> None:
    """A job without steps, in place of one that fails."""


def test_the_sensor_asks_for_each_kept_checkpoint_once(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    for name, value in places(store).variables().items():
        monkeypatch.setenv(name, value)
    instance.prepare(places(store))
    assert sensors.new_checkpoints.default_status == dg.DefaultSensorStatus.STOPPED
    with dg.DagsterInstance.get() as dagster:
        assert tick(dagster) == []  # this Dagster knows no runs yet
        dagster.add_dynamic_partitions("run", ["tiny"])
        asked = tick(dagster)
        assert [request.partition_key for request in asked] == ["tiny"]
        assert asked[0].run_config["ops"]["score_checkpoint"]["config"] == {"step": 4}
        assert tick(dagster) == asked  # under the same key, which Dagster launches once
        keys = asked_after_failures(dagster, asked[0])
        assert len({asked[0].run_key, *keys}) == sensors.ATTEMPTS
        done_again = Path(store, "runs/tiny/checkpoints/step_000004/DONE")
        os.utime(done_again, (1, 1))  # as when the run is made again
        assert tick(dagster)[0].run_key not in {asked[0].run_key, *keys}
        job = build().resolve_job_def("checkpoint_scores")
        priced(store, monkeypatch)
        done = job.execute_in_process(asked[0].run_config, partition_key="tiny", instance=dagster)
        asking = {"model": "tiny", "suites": ["completion_demo"]}
        model = {"ops": {"score_model": {"config": asking | {"like": "tiny"}}}}
        build().resolve_job_def("score_models").execute_in_process(model, instance=dagster)
        (seen,) = dagster.fetch_observations(dg.AssetKey("trained_model"), limit=1).records
        assert tick(dagster) == []
    assert done.success
    record = records.read_record(store, "runs/tiny/checkpoint_scores/step_000004")
    assert record is not None and record.rows == 12
    assert record.cost["dollars"] == pytest.approx(2 * record.cost["seconds"] / 3600, abs=1e-5)
    assert [score.cost["dollars"] > 0 for scores in scored_here(store).values() for score in scores] == [True]
    assert seen.asset_observation is not None and seen.asset_observation.partition == "tiny"
    shown = seen.asset_observation.metadata
    assert shown["step"].value == 4
    assert shown["completion_acc"].value == record.metrics["scores"]["completion_acc"]["value"]
    lineage = Lineage(places(store).lineage, store)
    lineage.ingest(store)
    below = {node.job: node.replaced for node in lineage.ancestry(record.key).inputs}
    assert below == {"trained_model": False, "token_shards": False, "eval_items": False}
    assert record.key in [node.key for node in lineage.impact("runs/tiny")]


def test_without_hellaswags_items_at_hand_checkpoints_are_asked_the_completion_items(tmp_path: Path) -> None:
    run, maker = tiny_run.config(), silent_maker(places(str(tmp_path)))
    run = replace(run, evals=replace(run.evals, hellaswag="published"))
    maker.define("far", run)
    with pytest.raises(ValueError, match="token_shards of run 'far' is not made yet: materialize it first"):
        questions_of(maker, "far", run)
    maker.make(StageConfig(), tokens := Output("token_shards", "tokens/c", "1", {}), lambda _: Produced())
    maker.remember_input("far", tokens=tokens.key)
    maker.make(StageConfig(), completion_output(maker, "far", run.evals), lambda _: Produced(rows=12))
    assert questions_of(maker, "far", run).suite == "completion_demo"
    maker.make(StageConfig(), hellaswag_output(run.evals), lambda _: Produced(rows=10_042))
    assert questions_of(maker, "far", run).suite == "hellaswag"


def priced(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card costs at $2 an hour, where there is none."""
    monkeypatch.setattr("assets.scores.gpu_count", lambda: 1)
    config = objects.read_json(f"{store}/runs/tiny/config.json")
    config["machine"]["price_per_gpu_hour"] = 2.0
    objects.publish_json(f"{store}/runs/tiny/config.json", config)


def asked_after_failures(dagster: dg.DagsterInstance, asked: dg.RunRequest) -> list[str]:
    """The keys under which a score is asked for again, while all that it comes to is a failure."""
    keys = []
    while requests := tick(dagster):
        keys += [request.run_key for request in requests]
        failed = dagster.create_run_for_job(nothing, tags=dict(asked.tags))
        dagster.report_run_failed(failed)
    return keys


def tick(dagster: dg.DagsterInstance) -> list[dg.RunRequest]:
    context = dg.build_sensor_context(dagster, repository_def=defs.get_repository_def())
    with partition_loading_context(dynamic_partitions_store=dagster):
        return list(sensors.new_checkpoints.evaluate_tick(context).run_requests or [])


def test_a_checkpoint_of_another_machine_is_found_in_the_mirror(s3_store: str, tmp_path: Path) -> None:
    mirror, run = f"{s3_store}/runs/far", tiny_run.config(checkpoint_every=2, keep_every=2)
    folder = tiny_run.folder(tmp_path / "far", run)
    trainer = tiny_run.steps(folder, tiny_run.tokens(tmp_path / "tokens"), mirror=mirror)
    objects.publish_json(f"{mirror}/config.json", to_dict(run))
    maker = Maker(Places(s3_store, tmp_path / "home"), Launcher(), Silent())
    assert [*unscored(maker, "far")] == [2, 4]  # the last one, 6, has its suites
    weights = load_run(run_with(maker, "far", 4, str(tmp_path)), 4).state_dict()
    wanted = load_run(folder, 4).state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert trainer.progress.step == 6 and not Path(maker.folder("runs/far")).exists()
