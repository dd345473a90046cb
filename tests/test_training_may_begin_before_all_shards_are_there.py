"""Shards can be read in order while later ones are made: the same ones as when all is complete."""

import threading
from queue import Queue

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import wait_for

from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import Launcher, Silent
from storage import objects, records, shards
from storage.places import Places
from training import arrival, pieces, tokenization
from training.arrival import Arrivals, stage_as_they_come


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(arrival, "POLL", 0.01)
    monkeypatch.setattr(pieces, "PIECE_TEXT", 10_000)


@pytest.fixture
def corpus(tmp_path):
    path = str(tmp_path / "documents.parquet")
    pq.write_table(pa.table({"text": [f"number {n} " * 200 for n in range(40)]}), path, row_group_size=4)
    return [path]


def tokenize(corpus, out: str, work: str, progress=lambda *_: None):
    return tokenization.tokenize(corpus, out, "c", 2_500, work, 1, progress)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_shards_arrive_in_order_while_later_ones_are_made(corpus, tmp_path, where, request, caplog):
    caplog.set_level("INFO")
    out = f"{request.getfixturevalue('s3_store')}/tokens" if where == "s3" else str(tmp_path / "out")
    arrivals = Arrivals(out, str(tmp_path / "local"))
    go_on = threading.Event()
    seen: list[int] = []

    def hold(tokens: int, done: int, total: int) -> None:
        if tokens > 7_000 and not seen:
            arrivals.wait(1)
            seen.append(len(arrivals.paths))
            assert not arrivals.complete
            go_on.set()
            wait_for(lambda: "waiting for training shard" in caplog.text)  # before the next one is made

    maker = threading.Thread(target=tokenize, args=(corpus, out, str(tmp_path / "work"), hold))
    maker.start()
    assert go_on.wait(240)
    arrivals.wait(10**6)
    maker.join()
    assert arrivals.complete and 0 < seen[0] < len(arrivals.paths)
    tokenize(corpus, str(tmp_path / "whole"), str(tmp_path / "work-2"))
    expected = shards.shard_paths(str(tmp_path / "whole"), "train")
    assert [shards.open_shard(p).tolist() for p in arrivals.paths] == [shards.open_shard(p).tolist() for p in expected]


def test_a_gap_ends_what_can_be_read(corpus, tmp_path):
    tokenize(corpus, str(tmp_path / "out"), str(tmp_path / "work"))
    (tmp_path / "out" / "c_train_000003.bin").unlink()
    (tmp_path / "out" / "complete.json").unlink()
    arrivals = Arrivals(str(tmp_path / "out"))
    arrivals.look()
    assert [p[-10:] for p in arrivals.paths] == ["000001.bin", "000002.bin"] and not arrivals.complete


def test_a_folder_without_a_plan_is_complete_as_it_is(corpus, tmp_path):
    tokenize(corpus, str(tmp_path / "out"), str(tmp_path / "work"))
    (tmp_path / "out" / "plan.json").unlink()
    arrivals = Arrivals(str(tmp_path / "out"))
    arrivals.wait(10**6)
    assert arrivals.complete and arrivals.paths == shards.shard_paths(str(tmp_path / "out"), "train")


OUTPUT = Output("token_shards", "tokens/c", "1", {})


def add_shards(out: str, *indexes: int) -> None:
    for index in indexes:
        name = shards.shard_name("c", shards.split_of(index), index)
        shards.write_shard(f"{out}/{name}", np.full(3000, index, dtype=np.uint16))


@pytest.fixture
def begun(tmp_path, s3_store):
    """A maker on S3, and what failed in the copying of two shards and those that follow."""
    maker = Maker(Places(s3_store, tmp_path / "home"), Launcher(), Silent())
    out, failed, cancelled = f"{s3_store}/{OUTPUT.key}", Queue(), threading.Event()
    add_shards(out, 0, 1)
    objects.publish_json(f"{out}/{shards.PLAN}", {})
    assert stage_as_they_come(out, maker.folder(OUTPUT.key), cancelled, failed.put)
    yield maker, out, failed
    cancelled.set()


def test_training_need_not_wait_for_the_copies_of_all_shards_that_are_there(tmp_path, s3_store, monkeypatch):
    monkeypatch.setattr(arrival, "POLL", 600.0)  # no look comes after the first
    out, local, cancelled = f"{s3_store}/tokens/c", str(tmp_path / "local"), threading.Event()
    add_shards(out, 0, 1, 2, 3)
    objects.publish_json(f"{out}/{shards.PLAN}", {})
    assert stage_as_they_come(out, local, cancelled, pytest.fail)
    cancelled.set()
    assert [s.path for s in objects.list_files(local, ".bin")] == ["c_train_000001.bin", "c_val_000000.bin"]


def test_copying_goes_on_after_an_error_of_the_store_and_nothing_is_copied_again(begun, monkeypatch, caplog):
    maker, out, failed = begun
    local, fetch, away = maker.folder(OUTPUT.key), objects.fetch, [OSError("the network is away")]

    def fetch_or_fail(url: str, path: str) -> None:
        if away:
            raise away.pop()
        fetch(url, path)

    monkeypatch.setattr(objects, "fetch", fetch_or_fail)
    add_shards(out, 2, 3)
    objects.publish_json(f"{out}/{shards.COMPLETE}", [])
    arrivals = Arrivals(local)
    wait_for(lambda: arrivals.look() and arrivals.complete)
    assert len(arrivals.paths) == 3 and failed.empty()
    assert "can't be copied now (the network is away): trying again" in caplog.text
    files = [records.describe_file(out, s.path) for s in objects.list_files(out, ".bin")]
    made, _ = maker.make(StageConfig(), OUTPUT, lambda _: Produced(files=files))
    monkeypatch.setattr(objects, "copy", lambda *_: pytest.fail("copied again"))
    assert maker.stage(made.record) == local


def test_a_local_file_that_is_not_the_stores_is_copied_again(begun):
    maker, out, _ = begun
    files = [records.describe_file(out, s.path) for s in objects.list_files(out, ".bin")]
    made, _ = maker.make(StageConfig(), OUTPUT, lambda _: Produced(files=files))
    local = f"{maker.folder(OUTPUT.key)}/{files[0].path}"
    objects.publish_bytes(local, b"x" * files[0].bytes)
    maker.stage(made.record)
    assert objects.sha256(local) == files[0].sha256


def test_a_shard_that_is_none_is_told_to_who_waits(begun):
    _, out, failed = begun
    objects.publish_bytes(f"{out}/c_train_000002.bin", b"x" * 3000)
    failure = failed.get(timeout=240)
    assert isinstance(failure, ValueError) and "c_train_000002.bin is no token shard" in str(failure)
