"""Where does Dagster remember runs, and what becomes of one whose process died?"""

import importlib.util
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import yaml

from assets.resources import POOL
from pipeline import runs
from pipeline.page import SERVED_BY
from storage import objects
from storage.places import Places
from training.processes import locked, processes_here, started

POSTGRES_VARIABLE = "DAGSTER_POSTGRES_URL"
POSTGRES_SCHEME = "postgresql+psycopg2://"
OURS = "# Written by gpt2 at each start. To change it, delete this line: the file is yours then.\n"
SETTINGS = """\
concurrency:
  pools: # no two steps of a pool at a time: trainings and evals, in the pool gpu, never share the cards
    default_limit: 1
    granularity: op
run_monitoring: # a run that never starts, or never stops when told to, is not left so
  enabled: true
  start_timeout_seconds: 180
  cancel_timeout_seconds: 600 # longer than any recipe's training gets for its last checkpoint
  poll_interval_seconds: 30
telemetry:
  enabled: false
nux:
  enabled: false
"""
NEEDED = ("concurrency", "run_monitoring")  # of these, whatever else a user's own file may leave out
WITHOUT = "two trainings may share the cards, and a run that never starts stays so"
EMBEDDED = "# Runs, events and logs lie in this folder (SQLite).\n"
TEAM = f"""\
storage: # runs and events; what the steps printed lies in this folder
  postgres:
    postgres_url:
      env: {POSTGRES_VARIABLE}
"""

PARTITION_TAG = "dagster/partition"
HOST_TAG, AMONG_TAG, PROCESS_TAG, ALIVE_TAG = "gpt2/host", "gpt2/among", "gpt2/process", "gpt2/alive"
UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
NAMELESS_SECONDS = 300.0  # after which a run whose process has not named itself never had one for long
ALIVE_SECONDS = 60.0  # between two notes that a run's process lives
SILENT_SECONDS = 900.0  # without one, after which a run of another machine counts as lost; clocks may differ a little
PARENT_SECONDS = 1.0  # between two looks at whether the parent lives
SWEEP_SECONDS = 5.0  # between two sweeps beside a run of the command line


def prepare(places: Places) -> None:
    """Point this process, and all that it starts, at the instance under the home; make it on first use.

    Raises ValueError where runs are kept in PostgreSQL and nothing says, or can say, in which.
    """
    settings = places.dagster_home / "dagster.yaml"
    there = settings.read_text() if settings.exists() else OURS
    url = os.environ.get(POSTGRES_VARIABLE)
    if POSTGRES_VARIABLE in there and not url:
        raise ValueError(
            f"{settings} keeps the runs in PostgreSQL: set {POSTGRES_VARIABLE}, or delete the file to start "
            "anew in SQLite"
        )
    if url and not url.startswith(POSTGRES_SCHEME):
        place = url.partition("://")[2].rpartition("@")[2]  # without its password
        raise ValueError(f"{POSTGRES_VARIABLE} of …@{place} must begin with {POSTGRES_SCHEME}")
    if url and importlib.util.find_spec("dagster_postgres") is None:
        raise ValueError(f"{POSTGRES_VARIABLE} is set but dagster-postgres is not installed: pip install '.[team]'")
    wanted = OURS + (TEAM if url else EMBEDDED) + SETTINGS
    places.dagster_home.mkdir(parents=True, exist_ok=True)
    if there.startswith(OURS) and there != wanted:
        objects.publish_bytes(str(settings), wanted.encode())
    if not there.startswith(OURS):
        _warn_of_missing(settings, there)
    os.environ.update(places.variables())


def opened(places: Places) -> dg.DagsterInstance:
    """The instance, opened by one process at a time: of two that make SQLite's tables at once, one would fail."""
    with locked(places.dagster_home / "opening.lock", lambda: None):
        return dg.DagsterInstance.get()


def _warn_of_missing(settings: Path, text: str) -> None:
    """Say which of our settings a file lacks that its owner has changed, or that an older version wrote."""
    theirs = yaml.safe_load(text) or {}
    missing = {name: value for name, value in yaml.safe_load(SETTINGS).items() if name in NEEDED and name not in theirs}
    if missing:
        sys.stderr.write(
            f"{settings} is not kept up to date by gpt2 and lacks {' and '.join(missing)}, so {WITHOUT}. Add to it, or "
            f"delete the file to get it all:\n{yaml.safe_dump(missing, sort_keys=False)}"
        )


@contextmanager
def owned(dagster: dg.DagsterInstance, run: dg.DagsterRun) -> Iterator[None]:
    """Note which process executes a run and, within this, that it lives; end with the code server that launched it.

    Only the process itself can say so: Dagster tells nobody where a run is executed.
    """
    pid = os.getpid()
    place = {HOST_TAG: platform.node(), AMONG_TAG: processes_here(), PROCESS_TAG: f"{run.run_id}:{pid}:{started(pid)}"}
    dagster.add_run_tags(run.run_id, place | _alive())
    if run.remote_job_origin is not None:
        threading.Thread(target=_end_with_server, daemon=True).start()
    with _repeated(lambda: dagster.add_run_tags(run.run_id, _alive()), ALIVE_SECONDS):
        yield


def _alive() -> dict[str, str]:
    return {ALIVE_TAG: f"{time.time():.0f}"}


@contextmanager
def swept(dagster: dg.DagsterInstance, places: Places) -> Iterator[None]:
    """Within this, a run that waits for the cards gets them once who held them is gone, also without a daemon."""
    with _repeated(lambda: sweep(dagster, places), SWEEP_SECONDS):
        yield


@contextmanager
def _repeated(task: Callable[[], object], seconds: float) -> Iterator[None]:
    """Within this, a thread does the task every so many seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            task()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sweep(dagster: dg.DagsterInstance, places: Places) -> list[str]:
    """Mark as failed the runs whose process has died, or whose machine is lost -> their ids; free the cards that ended
    runs hold and nothing of theirs uses any more."""
    dead = []
    for record in dagster.get_run_records(dg.RunsFilter(statuses=UNFINISHED)):
        run, reason = record.dagster_run, _dead(record)
        if reason:
            dagster.report_run_failed(run, reason)
            dead.append(run.run_id)
    for run_id in dagster.event_log_storage.get_concurrency_run_ids():
        holder = dagster.get_run_by_id(run_id)
        if holder is None or (holder.is_finished and not _is_at_work(holder, places)):
            dagster.event_log_storage.free_concurrency_slots_for_run(run_id)
    return dead


def _is_at_work(ended: dg.DagsterRun, places: Places) -> bool:
    """Whether a run that counts as ended may still use the cards: its process lives, or the ranks that it has left
    behind save their checkpoint. Of another machine's run that is not known until that was silent for long."""
    tags = ended.tags
    if _is_elsewhere(tags.get(HOST_TAG, platform.node()), tags.get(AMONG_TAG, processes_here())):
        return time.time() - float(tags.get(ALIVE_TAG, "0")) < SILENT_SECONDS
    run_id, pid, since = [*tags.get(PROCESS_TAG, "").split(":"), "", ""][:3]
    lives = run_id == ended.run_id and started(int(pid)) == since
    return lives or tags.get(PARTITION_TAG) in runs.busy(places)


def holders(dagster: dg.DagsterInstance) -> list[str]:
    """The runs that hold the pool of the cards, in words."""
    held = dagster.event_log_storage.get_concurrency_info(POOL).active_run_ids
    runs = [dagster.get_run_by_id(run_id) for run_id in sorted(held)]
    return [f"{run.tags.get(PARTITION_TAG, run.job_name)} (Dagster's run {run.run_id[:8]})" for run in runs if run]


def _dead(record: dg.RunRecord) -> str:
    """Why a run can't be going on; empty where it may."""
    tags = record.dagster_run.tags
    run_id, _, process = tags.get(PROCESS_TAG, "").partition(":")
    if run_id != record.dagster_run.run_id:  # none, or one copied from the run that this is a retry of
        silent = time.time() - record.create_timestamp.timestamp() > NAMELESS_SECONDS
        begun = record.start_time is not None and time.time() - record.start_time > NAMELESS_SECONDS
        return "The process that executed this run died before it had begun." if silent and begun else ""
    host = tags.get(HOST_TAG, "")
    if _is_elsewhere(host, tags.get(AMONG_TAG, processes_here())):
        quiet = time.time() - float(tags.get(ALIVE_TAG, "inf"))
        return f"Nothing was heard of {host} for {quiet / 60:.0f} minutes." if quiet > SILENT_SECONDS else ""
    pid, _, since = process.partition(":")
    if started(int(pid)) == since:
        return ""
    return f"The process {pid} that executed this run died without a word."


def _is_elsewhere(host: str, among: str) -> bool:
    """Whether a run's process can't be seen from here. Only a team's machines may share a name: without a team's
    PostgreSQL, another boot of this name is an earlier one of this machine, whose processes are gone."""
    rebooted = among.partition(" ")[0] != processes_here().partition(" ")[0] and POSTGRES_VARIABLE not in os.environ
    return host != platform.node() or (among != processes_here() and not rebooted)


def _end_with_server() -> None:
    """Interrupt this process, as Ctrl-C would, when what launched it has died: nobody could stop the run any more."""
    parent, served_by = os.getppid(), int(os.environ.get(SERVED_BY, "0"))
    server = started(served_by)
    while os.getppid() == parent and started(served_by) == server:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)
