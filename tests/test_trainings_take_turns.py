"""Two runs never hold the cards at once: the pool has one place, and the command line waits for it as the page does."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import ROOT, TINY_SETTINGS, Finished, copied
from tiny_ui import wait_for

from pipeline.instance import POOL, opened, prepare
from storage.places import places


@dg.job
def rival() -> None:
    """Another run, that trains."""


@pytest.mark.slow
def test_a_command_waits_for_the_run_that_holds_the_cards(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    for name, value in places(store).variables().items():
        monkeypatch.setenv(name, value)
    prepare(places(store))
    command = ["run", "--name", "tiny", *TINY_SETTINGS, "--only", "trained_model", "--store", store]
    with dg.DagsterInstance.get() as dagster, open(tmp_path / "said", "w+") as said:
        storage = dagster.event_log_storage
        holder = dagster.create_run_for_job(rival, tags={"dagster/partition": "rival"}).run_id
        storage.initialize_concurrency_limit_to_default(POOL)
        assert storage.claim_concurrency_slot(POOL, holder, "trained_model").is_claimed
        waiting = subprocess.Popen(
            [sys.executable, "-m", "pipeline.commands.main", *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
        )
        wait_for("its turn to be asked for", lambda: bool(storage.get_concurrency_info(POOL).pending_run_ids))
        assert waiting.poll() is None
        storage.free_concurrency_slots_for_run(holder)
        assert waiting.wait(timeout=300) == 0
        assert f"the cards are held by rival (Dagster's run {holder[:8]})" in (tmp_path / "said").read_text()
        assert storage.get_concurrency_info(POOL).active_slot_count == 0


def open_at_once(store: str, ready) -> None:  # type: ignore[no-untyped-def]
    ready.wait(60)
    opened(places(store)).dispose()


def test_commands_that_start_at_once_on_a_new_store_all_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    for name, value in places(store).variables().items():
        monkeypatch.setenv(name, value)
    prepare(places(store))
    here = multiprocessing.get_context("fork")
    ready = here.Barrier(4)
    commands = [here.Process(target=open_at_once, args=(store, ready), daemon=True) for _ in range(4)]
    for command in commands:
        command.start()
    for command in commands:
        command.join(60)
    assert [command.exitcode for command in commands] == [0] * 4
