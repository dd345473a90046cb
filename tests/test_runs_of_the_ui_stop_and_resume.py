"""Runs launched from the page: terminate saves a checkpoint, a retry goes on from it, a kill leaves nothing behind."""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from test_a_killed_command_loses_nothing import processes_of
from tiny_pipeline import Finished, copied
from tiny_ui import RETRY, TERMINATE, Page, serve, wait_for

from pipeline import instance
from storage.checkpoints import complete
from storage.places import places
from training import plan, recipes

TRAINING = ["documents", "token_shards", "eval_items", "trained_model"]
ENDLESS = {
    "recipe": "demo",
    "model": {"layers": 1, "channels": 32, "heads": 2, "context": 64},
    "train": {"steps": 1_000_000, "batch_tokens": 512, "val_sequences": 8, "checkpoint_every": 20, "sample_tokens": 8},
    "evals": {"completion_items": 12, "harness_items": 8},
    "machine": {"resume": "no"},  # of the first start alone: the retry goes on
}


OBSERVED = """{assetNodes(assetKeys: [{path: "trained_model"}]) {assetObservations(limit: 1) {runId}}}"""


def newest(run: Path) -> int:
    return max(complete(str(run)), default=0)


def last_step(run: Path) -> int:
    lines = [line for line in (run / "main.log").read_text().splitlines() if " trl:" in line]
    return int(lines[-1].split()[0][2:]) + 1


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@dg.job
def nothing() -> None:
    """A job without steps."""


def test_a_run_whose_process_is_gone_is_marked_as_failed_and_no_other(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as dagster:
        dead, lives, retry, lost, far = (dagster.create_run_for_job(nothing) for _ in range(5))
        for run in (dead, lives, retry, lost, far):
            dagster.report_run_canceling(run)
            if run is not retry:
                with instance.owned(dagster, run):
                    pass
        gone = subprocess.Popen(["true"])
        gone.wait()
        process = {instance.PROCESS_TAG: f"{dead.run_id}:{gone.pid}:1"}
        dagster.add_run_tags(dead.run_id, process)
        dagster.add_run_tags(retry.run_id, process)  # a retry inherits the tags of its run
        elsewhere = {instance.HOST_TAG: "another-machine"}
        dagster.add_run_tags(far.run_id, elsewhere)
        dagster.add_run_tags(lost.run_id, elsewhere | {instance.ALIVE_TAG: f"{time.time() - 1000:.0f}"})
        assert {*instance.sweep(dagster, places(str(tmp_path)))} == {dead.run_id, lost.run_id}
        found = [dagster.get_run_by_id(run.run_id).status.value for run in (dead, lives, retry, lost, far)]
        assert found == ["FAILURE", "CANCELING", "CANCELING", "FAILURE", "CANCELING"]


@pytest.mark.parametrize(
    ("boot", "container", "team", "swept"),
    [
        ("", "", True, True),  # a process of this machine
        ("another", "", True, False),  # another machine of the team that has the same name
        ("another", "", False, True),  # this machine, before it was booted again
        ("", "another", False, False),  # another container on this machine, that has the same name
    ],
)
def test_a_run_of_another_machine_of_this_name_is_left_alone(
    boot: str, container: str, team: bool, swept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if team:
        monkeypatch.setenv(instance.POSTGRES_VARIABLE, "postgresql+psycopg2://team/runs")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as dagster:
        run = dagster.create_run_for_job(nothing)
        dagster.report_run_canceling(run)
        with instance.owned(dagster, run):
            here = dagster.get_run_by_id(run.run_id).tags[instance.AMONG_TAG].split(" ")
        process = {instance.PROCESS_TAG: f"{run.run_id}:{2**22 + 1}:1"}  # there is none of this number here
        dagster.add_run_tags(run.run_id, process | {instance.AMONG_TAG: f"{boot or here[0]} {container or here[1]}"})
        assert instance.sweep(dagster, places(str(tmp_path))) == ([run.run_id] if swept else [])


@pytest.mark.parametrize("silent", [0, 1000])
def test_the_cards_of_a_dead_run_are_free_when_its_ranks_are_gone(silent: int, tmp_path: Path) -> None:
    """On this machine that is seen; another one has to be silent for long."""
    place = places(str(tmp_path / "store"))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as dagster:
        slots = dagster.event_log_storage
        slots.set_concurrency_slots(instance.POOL, 2)
        here, far = (dagster.create_run_for_job(nothing, tags={instance.PARTITION_TAG: "r"}) for _ in range(2))
        for run in (here, far):
            with instance.owned(dagster, run):
                assert slots.claim_concurrency_slot(instance.POOL, run.run_id, "trained_model").is_claimed
            dagster.add_run_tags(run.run_id, {instance.PROCESS_TAG: f"{run.run_id}:{2**22 + 1}:1"})
            dagster.report_run_canceled(run)  # as after the time in which it had to stop
        heard = {instance.HOST_TAG: "another-machine", instance.ALIVE_TAG: f"{time.time() - silent:.0f}"}
        dagster.add_run_tags(far.run_id, heard)
        (place.home / "locks").mkdir(parents=True)
        with open(place.home / "locks/r.lock", "w") as lock:  # as its ranks hold on to it
            fcntl.flock(lock, fcntl.LOCK_EX)
            instance.sweep(dagster, place)
            assert slots.get_concurrency_run_ids() == ({here.run_id} if silent else {here.run_id, far.run_id})
        instance.sweep(dagster, place)
        assert slots.get_concurrency_run_ids() == (set() if silent else {far.run_id})


def test_every_recipe_may_save_its_last_checkpoint_before_it_is_given_up() -> None:
    monitoring = yaml.safe_load(instance.SETTINGS)["run_monitoring"]
    longest = max(plan.shutdown_seconds(make(), ranks=1) for make in recipes.RECIPES.values())
    assert monitoring["cancel_timeout_seconds"] > longest
    assert "free_slots_after_run_end_seconds" not in monitoring  # the cards are free when the ranks are gone


def tags(page: Page, run_id: str) -> dict[str, str]:
    query = "query($id: ID!) {runOrError(runId: $id) {... on Run {tags {key value}}}}"
    return {tag["key"]: tag["value"] for tag in page.ask(query, id=run_id)["runOrError"]["tags"]}


def observed(page: Page) -> list[str]:
    """The run that the trained model was last observed in, if it was in any."""
    return [seen["runId"] for seen in page.ask(OBSERVED)["assetNodes"][0]["assetObservations"]]


@pytest.mark.slow
def test_terminate_saves_retry_resumes_and_kill_9_of_everything_leaves_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path, "runs")
    run = Path(store, "runs", "endless")
    with serve(store) as page:
        config: dict[str, Any] = {"resources": {"new_run": {"config": ENDLESS}}}
        first = page.launch("demo", "endless", TRAINING, config)["run"]["runId"]
        wait_for("the first checkpoint", lambda: newest(run) > 0)
        page.ask(TERMINATE, id=first)
        wait_for("the end", lambda: page.status(first) == "CANCELED")
        wait_for("the ranks to end", lambda: not processes_of(run))
        saved = newest(run)
        assert saved == last_step(run)  # no step was lost

        again = {"parentRunId": first, "strategy": "FROM_FAILURE"}
        second = page.ask(RETRY, params=again)["launchRunReexecution"]["run"]["runId"]
        wait_for("steps after the checkpoint", lambda: newest(run) > saved)
        assert f"resumed from {run}/checkpoints/step_{saved:06d}" in (run / "train.log").read_text()

        worker = int(tags(page, second)[instance.PROCESS_TAG].split(":")[1])
        wait_for("its picture", lambda: observed(page) == [second])  # which is drawn while the steps go on
        os.kill(page.process.pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        page.process.wait()
    wait_for("the ranks to end", lambda: not processes_of(Path(store)))
    assert newest(run) == last_step(run)
    wait_for("webserver, daemon and code server to end", lambda: not group_lives(page.process.pid))
    monkeypatch.setenv("DAGSTER_HOME", str(places(store).dagster_home))
    with dg.DagsterInstance.get() as dagster:
        instance.sweep(dagster, places(store))  # as the next command and the next daemon do
        assert dagster.get_run_by_id(second).status.value == "FAILURE"
        assert not dagster.event_log_storage.get_concurrency_info("gpu").active_slot_count
