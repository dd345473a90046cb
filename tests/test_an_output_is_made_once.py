"""Two that want the same output at once: one makes it, the other waits and reuses it; a dead one holds nobody up."""

import os
import subprocess
import sys
import threading
import time

import pytest
from tiny_pipeline import ROOT

from assets import turns
from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import Launcher, Silent
from storage import objects, records
from storage.places import Places
from training import claims

OUTPUT = Output("documents", "corpora/c/documents", "1", {"kind": "test"})


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_store")


def maker(store: str, tmp_path, machine: str) -> Maker:
    return Maker(Places(store, tmp_path / machine), Launcher(), Silent())


def test_who_comes_second_reuses(store, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "POLL", 0.05)
    made, begun, go_on = [], threading.Event(), threading.Event()

    def produce(machine: str) -> Produced:
        begun.set()
        go_on.wait(10)
        folder = records.folder_url(store, OUTPUT.key)
        objects.publish_bytes(objects.join(folder, "a.parquet"), b"1")
        made.append(machine)
        return Produced(files=[records.describe_file(folder, "a.parquet")])

    def make(machine: str, told: list) -> None:
        told.append(maker(store, tmp_path, machine).make(StageConfig(), OUTPUT, lambda _: produce(machine))[0])

    first, second = [], []
    threads = [threading.Thread(target=make, args=("one", first)), threading.Thread(target=make, args=("two", second))]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    time.sleep(0.5)
    assert not second  # it waits
    go_on.set()
    for thread in threads:
        thread.join()
    assert made == ["one"]
    assert (first[0].reused, second[0].reused) == (False, True)
    assert objects.list_files(objects.join(store, turns.CLAIMS)) == []


def test_a_run_that_is_trained_on_another_machine_is_refused(store, tmp_path):
    with maker(store, tmp_path, "one").training("r"):
        refused = pytest.raises(ValueError, match=f"'r' is being trained by process {os.getpid()} of .*: wait for it")
        with refused, maker(store, tmp_path, "two").training("r"):
            pass
        with maker(store, tmp_path, "two").training("another"):
            pass
    with maker(store, tmp_path, "two").training("r"):
        pass


def test_a_process_of_this_machine_that_was_killed_is_followed_at_once(tmp_path):
    """Not after the lease that another machine's silence takes."""
    place = str(tmp_path)
    code = (
        "import os, signal; from training.claims import Claims; "
        f"c = Claims({place!r}); assert c.take('work'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    with claims.Claims(place) as ours:
        assert ours.owner_of("work")
        assert ours.take("work")


@pytest.mark.parametrize(
    ("process", "taken"),
    [
        ({}, False),  # it lives
        ({"pid": 2**22 + 1}, True),  # no such process
        ({"started": "1"}, True),  # another one has its number now
        ({"among": "another machine of this name", "pid": 2**22 + 1}, False),
    ],
)
def test_only_who_is_seen_to_be_gone_loses_a_claim_at_once(tmp_path, process, taken):
    owner = claims.Claims(str(tmp_path))
    owner.process = owner.process | process
    assert owner.take("work")
    assert claims.Claims(str(tmp_path)).take("work") == taken
