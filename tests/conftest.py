"""What every test may use: a real S3 server on loopback, and the real data where it is at hand."""

import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from tiny_pipeline import TINY_SETTINGS, Finished, gpt2

from training.gpus import gpu_count

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Nothing may leave this machine, Dagster tells nobody what it does, and kernels are interpreted without a GPU."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DAGSTER_DISABLE_TELEMETRY": "1"}
    if gpu_count() == 0:  # before anything imports Triton, which looks at it once: its kernels run on the CPU then
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before the items of other markers are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on real data are no part of the suite where that data is not at hand; a finished run makes a test slow."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if not real_data().is_dir():
        there = [item for item in items if "shared_data" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=there)
        items[:] = [item for item in items if item not in there]


def real_data() -> Path:
    """FineWeb-Edu-style parquet and HellaSwag's items: GPT2_SHARED_DATA, or shared/data beside the checkout."""
    return Path(os.environ.get("GPT2_SHARED_DATA") or ROOT.parent / "shared" / "data")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """With GPT2_NO_SKIPS=1 a skipped test fails, unless it needs a GPU: nothing goes untested unnoticed."""
    report = yield
    if report.skipped and os.environ.get("GPT2_NO_SKIPS") == "1" and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def signals_of_a_new_process() -> None:
    """A trainer in this process leaves its handlers behind, and a shell has what runs in its background ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server in this process, on a free port of 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh `s3://bucket/prefix`, with the environment that this process and its children reach it by."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}/store"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and real HellaSwag items, where it is at hand."""
    return real_data()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    store = str(folder / "store")
    done = gpt2("run", "--name", "tiny", *TINY_SETTINGS, "--store", store, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return Finished(store, json.loads(done.stdout))
