"""A checkpoint that a run keeps is found by the sensor, scored once, and its score leads down to the documents."""

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from tiny_pipeline import Finished, copied

from pipeline import instance, sensors
from pipeline.definitions import build, defs
from storage import records
from storage.lineage import Lineage
from storage.places import places


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
        assert [(request.run_key, request.partition_key) for request in asked] == [("tiny@4", "tiny")]
        job = build().resolve_job_def("checkpoint_scores")
        done = job.execute_in_process(asked[0].run_config, partition_key="tiny", instance=dagster)
        (seen,) = dagster.fetch_observations(dg.AssetKey("trained_model"), limit=1).records
        assert tick(dagster) == []
    assert done.success
    record = records.read_record(store, "runs/tiny/checkpoint_scores/step_000004")
    assert record is not None and record.rows == 12
    assert seen.asset_observation is not None and seen.asset_observation.partition == "tiny"
    shown = seen.asset_observation.metadata
    assert shown["step"].value == 4
    assert shown["completion_acc"].value == record.metrics["scores"]["completion_acc"]["value"]
    lineage = Lineage(places(store).lineage, store)
    lineage.ingest(store)
    below = {node.job: node.replaced for node in lineage.ancestry(record.key).inputs}
    assert below == {"trained_model": False, "token_shards": False, "eval_items": False}
    assert record.key in [node.key for node in lineage.impact("runs/tiny")]


def tick(dagster: dg.DagsterInstance) -> list[dg.RunRequest]:
    context = dg.build_sensor_context(dagster, repository_def=defs.get_repository_def())
    with partition_loading_context(dynamic_partitions_store=dagster):
        return list(sensors.new_checkpoints.evaluate_tick(context).run_requests or [])
