"""Where does Dagster remember runs, and what becomes of one whose process died?"""

import os
import platform
from pathlib import Path

import dagster as dg

from storage.places import Places

SETTINGS = """\
# Runs, events and logs lie in this folder (SQLite). Written once; change it as you like.
telemetry:
  enabled: false
nux:
  enabled: false
"""
HOST_TAG, PROCESS_TAG = "gpt2/host", "gpt2/process"
UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]


def prepare(places: Places) -> None:
    """Point this process, and all that it starts, at the instance under the home; make it on first use."""
    places.dagster_home.mkdir(parents=True, exist_ok=True)
    settings = places.dagster_home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(SETTINGS)
    os.environ.update(places.variables())


def process_tags() -> dict[str, str]:
    """Tags that tell later whether the process behind a run still lives."""
    return {HOST_TAG: platform.node(), PROCESS_TAG: f"{os.getpid()}:{_started(os.getpid())}"}


def sweep(instance: dg.DagsterInstance) -> list[str]:
    """Mark as failed the runs whose process on this host has died -> their ids."""
    swept = []
    wanted = dg.RunsFilter(statuses=UNFINISHED, tags={HOST_TAG: platform.node()})
    for run in instance.get_runs(wanted):
        process = run.tags.get(PROCESS_TAG, "")
        pid, _, started = process.partition(":")
        if _started(int(pid)) != started:
            instance.report_run_failed(run, f"The process {pid} that executed this run died without a word.")
            swept.append(run.run_id)
    return swept


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; tells it from a later one of the same number."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "gone"
