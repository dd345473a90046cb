"""Two that want the same output at once: one makes it, the other waits and reuses it; a dead one holds nobody up."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from tiny_pipeline import ROOT, gpt2
from tiny_run import wait_for

from assets import turns
from assets.corpus import documents_output
from assets.failures import KILLED, ProcessFailed
from assets.making import Maker, Output, Produced, StageConfig
from assets.repeats import check_new
from assets.resources import Launcher, Silent
from assets.run_config import trainings
from assets.tokens import token_shards, tokens_output
from assets.trainer import Hold, claim_run, hold_run, trained_output
from pipeline import definitions
from storage import objects, records, sources
from storage.places import Places, places
from storage.records import Record
from training import claims, recipes
from training.config import TokenizeConfig
from training.workers import process_pool

OUTPUT = Output("documents", "corpora/c/documents", "1", {"kind": "test"})


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_store")


def maker(store: str, tmp_path, machine: str) -> Maker:
    return Maker(Places(store, tmp_path / machine), Launcher(), Silent())


class Told(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def progressed(self, asset: str, event: dict[str, Any]) -> None:
        self.said.append(f"{asset}: {event['message']}")


def test_who_comes_second_says_for_whom_it_waits_and_reuses(store, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "POLL", 0.05)
    made, begun, go_on = [], threading.Event(), threading.Event()

    def produce(machine: str) -> Produced:
        begun.set()
        go_on.wait(240)
        folder = records.folder_url(store, OUTPUT.key)
        objects.publish_bytes(objects.join(folder, "a.parquet"), b"1")
        made.append(machine)
        return Produced(files=[records.describe_file(folder, "a.parquet")])

    def make(machine: str, told: list) -> None:
        ours = replace(maker(store, tmp_path, machine), listener=listener)
        told.append(ours.make(StageConfig(), OUTPUT, lambda _: produce(machine))[0])

    listener, first, second = Told(), [], []
    threads = [threading.Thread(target=make, args=("one", first)), threading.Thread(target=make, args=("two", second))]
    threads[0].start()
    assert begun.wait(240)
    threads[1].start()
    wait_for(lambda: listener.said)
    assert listener.said[0].startswith(f"documents: waiting for process {os.getpid()} of ")
    assert not second
    go_on.set()
    for thread in threads:
        thread.join()
    assert made == ["one"]
    assert (first[0].reused, second[0].reused) == (False, True)
    assert objects.list_files(objects.join(store, turns.CLAIMS)) == []


def test_an_output_whose_worker_was_killed_says_so_in_one_line(store, tmp_path):
    def produce(_: object) -> Produced:
        with process_pool(2) as pool:
            return pool.submit(signal.raise_signal, signal.SIGKILL).result()

    with pytest.raises(ProcessFailed) as told:
        maker(store, tmp_path, "one").make(StageConfig(), OUTPUT, produce)
    assert str(told.value) == f"documents: one of its processes has crashed or {KILLED}"


@pytest.mark.slow
def test_shards_stay_until_it_is_our_turn_to_make_them_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(turns, "POLL", 0.05)
    store = str(tmp_path / "store")
    ours, file = maker(store, tmp_path, "one"), "000.parquet"
    ours.define("tiny", replace(tiny_run.config(), tokenize=TokenizeConfig(shard_tokens=60)))
    documents = Output("documents", "corpora/c/documents", "1", {})
    Path(ours.folder(documents.key)).mkdir(parents=True)
    pq.write_table(pa.table({"text": ["red green blue"] * 40}), f"{ours.folder(documents.key)}/{file}")
    ours.make(StageConfig(), documents, lambda _: Produced([file], rows=40, metrics={"text_bytes": 560}))
    ours.remember_input("tiny", documents=documents.key)
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("run", ["tiny"])

    def materialize(recompute: bool) -> bool:
        config = {"ops": {"token_shards": {"config": {"recompute": recompute}}}}
        done = dg.materialize([token_shards], config, instance, {"maker": ours}, partition_key="tiny")
        return done.success

    assert materialize(recompute=False)
    key = ours.inputs("tiny")["tokens"]
    before = {s.path: s.modified for s in objects.list_files(ours.folder(key), ".bin")}
    anew = threading.Thread(target=materialize, args=(True,), daemon=True)
    with turns.turn(store, key, print):
        anew.start()
        wait_for(lambda: "which makes tokens/" in caplog.text)
        assert {s.path: s.modified for s in objects.list_files(ours.folder(key), ".bin")} == before
    anew.join(240)
    after = {s.path: s.modified for s in objects.list_files(ours.folder(key), ".bin")}
    assert after.keys() == before.keys() and not {*after.values()} & {*before.values()}
    assert records.read_record(store, key) is not None


def test_a_run_that_is_trained_on_another_machine_is_refused(store, tmp_path):
    with hold_run(maker(store, tmp_path, "one"), "r"):
        refused = pytest.raises(ValueError, match=f"'r' is being trained by process {os.getpid()} of .*: wait for it")
        with refused, hold_run(maker(store, tmp_path, "two"), "r"):
            pass
        with hold_run(maker(store, tmp_path, "two"), "another"):
            pass
    with hold_run(maker(store, tmp_path, "two"), "r"):
        pass


class Far(claims.Claims):
    """Claims of a machine whose processes cannot be seen from here."""

    def __init__(self, store: str, **told: Any):
        super().__init__(objects.join(store, turns.CLAIMS), **told)
        self.owner = "far:7:0"
        self.process |= {"among": "another machine"}


def test_a_run_of_a_machine_that_was_lost_is_trained_after_a_lease(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(claims, "LEASE", 1.0)
    monkeypatch.setattr(turns, "POLL", 0.05)
    assert Far(store).take("training/r")  # and never renewed
    began = time.monotonic()
    with hold_run(maker(store, tmp_path, "two"), "r"):
        assert time.monotonic() - began > 1.0
    assert re.findall(r"process 7 of far has claimed this run: waiting until \d\d:\d\d:\d\d", caplog.text)
    assert objects.list_files(objects.join(store, turns.CLAIMS)) == []  # so that who comes next does not wait


def test_a_run_of_another_machine_that_lives_is_refused_at_its_sign_of_life(store, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 20.0)
    monkeypatch.setattr(claims, "RENEWALS", 40)
    monkeypatch.setattr(turns, "POLL", 0.05)
    with Far(store) as far:
        assert far.take("training/r")
        refused = pytest.raises(ValueError, match="'r' is being trained by process 7 of far: wait for it or stop it")
        with refused, hold_run(maker(store, tmp_path, "two"), "r"):
            pass


def test_a_claim_that_takes_long_to_read_was_not_silent_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 1.0)
    read = objects.read_bytes
    monkeypatch.setattr(objects, "read_bytes", lambda url: time.sleep(1.2) or read(url))
    assert Far(str(tmp_path)).take("work")
    assert not claims.Claims(objects.join(str(tmp_path), turns.CLAIMS)).take("work")


def test_renewals_outlive_an_error_of_the_store(store, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 3.0)
    monkeypatch.setattr(claims, "RENEWALS", 30)  # so that several fail within a lease
    told, publish, broken = [], objects.publish_bytes, threading.Event()

    def publish_or_fail(url: str, data: bytes) -> None:
        if broken.is_set():
            raise OSError("the store is away")
        publish(url, data)

    monkeypatch.setattr(objects, "publish_bytes", publish_or_fail)
    with Far(store, say=told.append) as far:
        assert far.take("work")
        broken.set()
        wait_for(lambda: told and told[-1].endswith("(the store is away): another machine may take the work over"))
        assert told[0].endswith("(the store is away), trying again")
        broken.clear()
        before = objects.list_files(far.place)[-1].modified
        wait_for(lambda: objects.list_files(far.place)[-1].modified != before)
        assert "work" in far.held


def test_who_was_silent_for_too_long_stops_its_training(store, monkeypatch):
    """The other way round would have two machines write into one run's folder."""
    monkeypatch.setattr(claims, "LEASE", 0.8)
    hold, told = Hold(lambda process: None), []
    with Far(store, on_lost=lambda name: hold.lose(), say=told.append) as far:
        assert far.take("training/r")
        hold.begin(subprocess.Popen(["sleep", "300"]))
        successor = objects.join(far.place, "training/r", "000001")
        assert objects.create_exclusive(successor, b"{}")
        assert hold.process.wait(120) == -signal.SIGTERM
        assert hold.lost.is_set() and "lost the claim on training/r" in told[0]
    assert [claim.path for claim in objects.list_files(far.place)][-1] == "training/r/000001"  # it keeps its claim
    late = subprocess.Popen(["sleep", "300"])
    hold.begin(late)  # as the loss may come before the process
    assert late.wait(120) == -signal.SIGTERM


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


@pytest.fixture
def begun(tmp_path) -> str:
    """A store in which the demo's documents are made, and its training has begun as run `a`."""
    store, config = str(tmp_path / "store"), recipes.recipe("demo")
    documents, metrics = documents_output(sources.resolve(config.corpus)), {"text_bytes": 1_800_000}
    definition = (documents.asset, documents.key, documents.fingerprint, documents.code_version, documents.config)
    records.write_record(store, Record(*definition, [], [], "", "", metrics=metrics))
    tokens = tokens_output(config, documents, metrics["text_bytes"])
    objects.publish_bytes(f"{store}/runs/broken/definition.json", b"{")
    claim_run(maker(store, tmp_path, "store"), "a", trained_output("a", config, tokens).fingerprint)
    return store


def test_what_another_run_trains_is_not_trained_again(begun, tmp_path, monkeypatch):
    """On the command line and from the launchpad it is refused before anything is made; that run itself goes on."""
    said = "run 'b' would train what run 'a' of this store trains or has trained"
    refused = gpt2("run", "demo", "--name", "b", "--store", begun, cwd=tmp_path)
    assert refused.returncode == 2 and said in refused.stderr and "--name a" in refused.stderr, refused.stderr
    for name, value in places(begun).variables().items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as dagster:
        dagster.add_dynamic_partitions("run", ["b"])
        job = definitions.build().resolve_job_def("demo")
        with pytest.raises(ValueError, match=said):
            new = {"resources": {"new_run": {"config": {"recipe": "demo"}}}}
            job.execute_in_process(new, partition_key="b", instance=dagster)
    assert not os.path.exists(f"{begun}/runs/b")
    here, config = maker(begun, tmp_path, "store"), recipes.recipe("demo")
    documents = documents_output(sources.resolve(config.corpus))
    another = replace(config, train=replace(config.train, order_seed=1))
    check_new(here, "a", config, documents)
    check_new(here, "b", another, documents)
    with pytest.raises(ValueError, match=said):
        claim_run(here, "b", trainings(here.places)["a"])  # of documents that were made since
