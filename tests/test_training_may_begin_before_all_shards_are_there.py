"""Shards can be read in order while later ones are made: the same ones as when all is complete."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import shards
from training import arrival, pieces, tokenization
from training.arrival import Arrivals


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

    maker = threading.Thread(target=tokenize, args=(corpus, out, str(tmp_path / "work"), hold))
    maker.start()
    assert go_on.wait(60)
    arrivals.wait(10**6)
    maker.join()
    assert arrivals.complete and 0 < seen[0] < len(arrivals.paths)
    assert "waiting for training shard" in caplog.text or where == "s3"
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
