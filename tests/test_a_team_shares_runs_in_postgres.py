"""With DAGSTER_POSTGRES_URL the runs of a team lie in PostgreSQL; without it, in the home, in SQLite."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import pytest
from tiny_pipeline import Finished, copied, free_port, gpt2
from tiny_ui import serve, wait_for

from pipeline import instance
from storage.places import Places, places

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
USER = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a free port of 127.0.0.1."""
    if not BINARIES:
        pytest.skip("no PostgreSQL on this machine (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp())  # not pytest's, which only root may enter
    port = free_port()
    if USER:
        shutil.chown(folder, USER)
    data = str(folder / "data")
    _command("initdb", "-D", data, "-U", "dagster", "-A", "trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
    _command("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    _command("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "dagster", "runs")
    yield f"postgresql+psycopg2://dagster@127.0.0.1:{port}/runs"
    _command("pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)


def _command(program: str, *arguments: str) -> None:
    command: Sequence[str] = [str(BINARIES[-1] / program), *arguments]
    subprocess.run(command, user=USER, cwd="/", check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_run_of_one_home_is_seen_in_another(
    postgres: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    monkeypatch.setenv(instance.POSTGRES_VARIABLE, postgres)
    monkeypatch.setenv("GPT2_HOME", str(tmp_path / "mine"))
    made = gpt2("run", "--name", "ours", "--only", "documents", "--store", store, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert not (tmp_path / "mine/dagster/history").exists()  # nothing went to SQLite
    monkeypatch.setenv("GPT2_HOME", str(tmp_path / "yours"))
    prepare_home(places(store), monkeypatch)
    with dg.DagsterInstance.get() as dagster:
        (run,) = dagster.get_runs()
        assert (run.tags["dagster/partition"], run.is_success) == ("ours", True)
        assert dagster.get_concurrency_config().pool_config.default_pool_limit == 1


@pytest.mark.slow
def test_a_run_launched_from_the_page_lies_in_postgres_too(
    postgres: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    with serve(store, **{instance.POSTGRES_VARIABLE: postgres}) as page:
        run = page.launch("__ASSET_JOB", "tiny", ["documents", "token_shards"])["run"]["runId"]
        wait_for("the run", lambda: page.status(run) in ("SUCCESS", "FAILURE", "CANCELED"))
        assert page.status(run) == "SUCCESS"
    assert not (tmp_path / "store/dagster/history").exists()
    monkeypatch.setenv(instance.POSTGRES_VARIABLE, postgres)
    prepare_home(places(store), monkeypatch)
    with dg.DagsterInstance.get() as dagster:
        assert dagster.get_run_by_id(run).is_success
        (made,) = dagster.fetch_materializations(dg.AssetKey("token_shards"), limit=1).records
        assert made.run_id == run


def test_without_the_variable_runs_lie_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(instance.POSTGRES_VARIABLE, raising=False)
    prepare(tmp_path, monkeypatch)
    with dg.DagsterInstance.get() as dagster:
        assert "postgres" not in str(dagster.info_dict())
        assert str(tmp_path) in str(dagster.info_dict())


def test_a_home_of_a_team_does_not_fall_back_to_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(instance.POSTGRES_VARIABLE, "postgresql+psycopg2://nobody@127.0.0.1:1/none")
    prepare(tmp_path, monkeypatch)
    monkeypatch.delenv(instance.POSTGRES_VARIABLE)
    with pytest.raises(ValueError, match=f"keeps the runs in PostgreSQL: set {instance.POSTGRES_VARIABLE}"):
        prepare(tmp_path, monkeypatch)


def test_a_url_of_another_driver_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(instance.POSTGRES_VARIABLE, "postgresql://me:secret@db.example/runs")
    with pytest.raises(ValueError, match=r"db.example/runs must begin with postgresql\+psycopg2://") as refused:
        prepare(tmp_path, monkeypatch)
    assert "secret" not in str(refused.value)


def test_settings_that_a_user_wrote_stay_and_what_they_lack_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "home/dagster/dagster.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("telemetry:\n  enabled: false\n")
    prepare(tmp_path, monkeypatch)
    assert settings.read_text() == "telemetry:\n  enabled: false\n"
    said = capsys.readouterr().err
    assert f"{settings} is not kept up to date by gpt2 and lacks concurrency and run_monitoring" in said
    settings.write_text(said.split("get it all:\n")[1])
    prepare(tmp_path, monkeypatch)
    assert capsys.readouterr().err == ""
    with dg.DagsterInstance.get() as dagster:
        assert dagster.get_concurrency_config().pool_config.default_pool_limit == 1


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_home(Places(str(folder / "store"), folder / "home"), monkeypatch)


def prepare_home(here: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in here.variables():
        monkeypatch.setenv(name, "")  # so that it is put back
    instance.prepare(here)
