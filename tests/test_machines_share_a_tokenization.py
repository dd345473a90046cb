"""Several machines make one corpus's shards in one store, each piece by one of them, and the dead are replaced."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import wait_for

from storage import objects
from training import claims, pieces, tokenization
from training.claims import Claims
from training.workers import Here

ROOT = str(Path(__file__).resolve().parent.parent)
SHARD_TOKENS = 5_000
CHILD = """
import pathlib, sys, time
from training import claims, pieces, tokenization
pieces.PIECE_TEXT, tokenization.POLL = 20_000, 0.1
if __name__ == "__main__":
    out, work, at_work, claims.LEASE = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    encode = tokenization.encode_piece
    begun = pathlib.Path(work + ".begun")
    def together(place, piece):
        if pieces.read_encoded(place, piece) is None:
            print(piece.index, flush=True)
            begun.touch()
            while len([*begun.parent.glob("*.begun")]) < at_work:
                time.sleep(0.01)
        return encode(place, piece)
    tokenization.encode_piece = together
    tokenization.tokenize(sys.argv[5:], out, "c", 5_000, work, 1, lambda *_: None, shared=True)
"""


@pytest.fixture
def corpus(tmp_path) -> list[str]:
    choose = random.Random(4)
    paths = []
    for number in range(3):
        texts = [" ".join(choose.choices(["red", "green", "blue", "of", "the"], k=200)) for _ in range(60)]
        paths.append(str(tmp_path / f"{number:03d}.parquet"))
        pq.write_table(pa.table({"text": texts}), paths[-1], row_group_size=10)
    return paths


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_TEXT", 20_000)
    monkeypatch.setattr(claims, "LEASE", 3.0)
    monkeypatch.setattr(tokenization, "POLL", 0.1)


def alone(corpus: list[str], folder: Path) -> dict[str, str]:
    out = str(folder / "alone")
    tokenization.tokenize(corpus, out, "c", SHARD_TOKENS, str(folder / "work"), 1, lambda *_: None)
    return digests(out)


def digests(out: str) -> dict[str, str]:
    return {s.path: objects.sha256(f"{out}/{s.path}") for s in objects.list_files(out) if s.path.startswith("c_")}


def machine(
    folder: Path, number: int, out: str, files: list[str], at_work: int = 1, lease: float = 3.0
) -> subprocess.Popen[str]:
    """A machine that holds its first piece until so many are at work."""
    script = folder / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), out, str(folder / f"work-{number}"), str(at_work), str(lease), *files]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT})


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_machines_divide_the_pieces_and_give_the_same_bytes(corpus, tmp_path, where, request):
    out = f"{request.getfixturevalue('s3_store')}/tokens" if where == "s3" else str(tmp_path / "shared")
    machines = [machine(tmp_path, number, out, corpus, at_work=2, lease=600) for number in range(2)]
    encoded = [list(map(int, m.communicate()[0].split())) for m in machines]
    assert [m.returncode for m in machines] == [0, 0]
    assert sorted(encoded[0] + encoded[1]) == list(range(18))
    assert all(encoded)
    assert digests(out) == alone(corpus, tmp_path)


@pytest.mark.slow
def test_a_dead_machines_piece_is_taken_over(corpus, tmp_path):
    out = str(tmp_path / "shared")
    dead = machine(tmp_path, 0, out, corpus, at_work=2)
    assert dead.stdout and dead.stdout.readline() == "0\n"
    dead.kill()
    dead.communicate()
    assert objects.list_files(f"{out}/pieces/claims")
    made = tokenization.tokenize(
        corpus, out, "c", SHARD_TOKENS, str(tmp_path / "work-1"), 2, lambda *_: None, shared=True
    )
    assert digests(out) == alone(corpus, tmp_path) == {f.path: f.sha256 for f in made.files}


@pytest.mark.slow
def test_one_who_comes_too_late_takes_what_the_others_have_made(corpus, tmp_path, monkeypatch):
    """A machine that slept through its lease finds that its piece's tokens have been used and removed."""
    out = str(tmp_path / "shared")

    def sleep_through(place: str, *_: object) -> None:
        machine(tmp_path, 1, out, corpus).communicate()
        raise FileNotFoundError(place)

    monkeypatch.setattr(tokenization, "cut_shard", sleep_through)
    monkeypatch.setattr(claims, "RENEWALS", 1e-3)
    made = tokenization.tokenize(
        corpus, out, "c", SHARD_TOKENS, str(tmp_path / "work-0"), 1, lambda *_: None, shared=True
    )
    monkeypatch.undo()
    assert digests(out) == alone(corpus, tmp_path) == {f.path: f.sha256 for f in made.files}


def test_a_machine_that_dies_before_the_last_word_is_replaced(corpus, tmp_path, monkeypatch):
    """All shards are there and the claim on the last word is a dead machine's: it is waited for, and then said."""
    out = str(tmp_path / "shared")
    monkeypatch.setattr(claims, "LEASE", 0.3)
    dead = Claims(f"{out}/pieces/claims")
    assert dead.take("complete")
    tokenization.tokenize(corpus, out, "c", SHARD_TOKENS, "", 1, lambda *_: None, shared=True)
    assert objects.exists(f"{out}/complete.json")
    assert digests(out) == alone(corpus, tmp_path)


def test_the_last_word_of_another_is_not_removed_by_one_who_comes_then(corpus, tmp_path, monkeypatch):
    """One looks, another says that all is complete, and then the first looks for lost pieces."""
    out, place = str(tmp_path / "shared"), str(tmp_path / "shared" / "pieces")
    forget = tokenization._Job._forget_lost_pieces

    def completed_meanwhile(job: tokenization._Job) -> None:
        monkeypatch.setattr(tokenization._Job, "_forget_lost_pieces", forget)
        tokenization.tokenize(corpus, out, "c", SHARD_TOKENS, "", 1, lambda *_: None, shared=True)
        forget(job)

    monkeypatch.setattr(tokenization._Job, "_forget_lost_pieces", completed_meanwhile)
    with Claims(f"{place}/claims") as ours:
        job = tokenization._Job(out, "c", SHARD_TOKENS, place, lambda *_: None, ours)
        job.extend(pieces.plan_pieces(corpus))
    assert objects.exists(f"{out}/complete.json")


def test_shards_of_another_corpus_are_not_overwritten(corpus, tmp_path):
    out = str(tmp_path / "shared")
    machine(tmp_path, 0, out, corpus).communicate()
    before = digests(out)
    with pytest.raises(ValueError, match="holds shards of another corpus or size: remove it"):
        tokenization.tokenize(corpus[:2], out, "c", 5_000, "", 1, lambda *_: None, shared=True)
    assert digests(out) == before


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_claim_has_one_owner_until_it_is_released(tmp_path, where, request):
    place = f"{request.getfixturevalue('s3_store')}/claims" if where == "s3" else str(tmp_path / "claims")
    with Claims(place) as one, Claims(place) as two:
        assert one.take("piece-000001") and not two.take("piece-000001")
        assert two.take("piece-000002") and not one.take("piece-000002")
        one.release("piece-000001")
        assert two.take("piece-000001")
    assert objects.list_files(place) == []


def test_work_of_others_is_asked_for_once_a_look(corpus, tmp_path, monkeypatch):
    """Whoever finds 17 of 18 pieces taken lists the claims once, and reads each of them once."""
    out, place = str(tmp_path / "shared"), str(tmp_path / "shared" / "pieces")
    monkeypatch.setattr(claims, "LEASE", 600.0)  # no claim is renewed meanwhile, which lists it
    listed: list[str] = []
    read: list[str] = []
    list_files, read_bytes = objects.list_files, objects.read_bytes
    monkeypatch.setattr(objects, "list_files", lambda url, suffix="": listed.append(url) or list_files(url, suffix))
    monkeypatch.setattr(objects, "read_bytes", lambda url: read.append(url) or read_bytes(url))
    with Claims(f"{place}/claims") as other, Claims(f"{place}/claims") as ours:
        assert all(other.take(f"piece-{number:06d}") for number in range(17))
        listed.clear()
        job = tokenization._Job(out, "c", SHARD_TOKENS, place, lambda *_: None, ours)
        job.extend(pieces.plan_pieces(corpus))
        assert [job.step(Here()) for _ in range(5)] == [True, False, False, False, False]
        assert job.encoded.keys() == {17}
        time.sleep(tokenization.POLL)
        job._look()
    claims_listed = [url for url in listed if "/claims" in url]
    assert claims_listed == [f"{place}/claims", f"{place}/claims/piece-000017", f"{place}/claims"]
    assert len([url for url in read if "/claims/" in url]) == 17


def test_a_claim_that_is_just_being_made_is_held(tmp_path):
    """On a local disk its name is there before its text."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "000000").touch()
    assert not Claims(str(tmp_path)).take("work")


def test_a_claim_is_none_on_work_whose_name_its_own_begins_with(tmp_path, monkeypatch):
    """An output may lie in another's folder, as a score does in its run's."""
    monkeypatch.setattr(claims, "LEASE", 0.4)
    with Claims(str(tmp_path)) as run, Claims(str(tmp_path)) as score:
        assert score.take("runs/r/scores/s") and run.take("runs/r")
        assert score.owner_of("runs/r") == run.owner and not score.take("runs/r")
        beats = run.beats
        wait_for(lambda: run.beats > beats + 2)  # it is renewed
        run.release("runs/r")
        assert score.owner_of("runs/r") == "" and "runs/r/scores/s" in score.held


def test_a_renewed_claim_outlives_many_leases_and_a_silent_one_does_not(tmp_path, monkeypatch):
    """By a clock on which a quarter of a lease passes at each renewal, however long that takes."""
    monkeypatch.setattr(claims, "LEASE", 2.0)
    monkeypatch.setattr(claims, "RENEWALS", 20)
    now = [0.0]
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now[0]))
    silent, other = Claims(str(tmp_path)), Claims(str(tmp_path))
    with Claims(str(tmp_path)) as alive:
        assert alive.take("renewed") and silent.take("silent")
        taken = []
        for _ in range(12):
            taken += [name for name in ("renewed", "silent") if name not in taken and other.take(name)]
            beats = alive.beats
            wait_for(lambda before=beats: alive.beats > before)
            now[0] += 0.5
        assert taken == ["silent"]


def by_ray(corpus, tmp_path):
    """On two local worker processes."""
    place, work = str(tmp_path / "ray"), str(tmp_path / "ray-work")
    tokenization.tokenize(corpus, place, "c", SHARD_TOKENS, work, 2, lambda *_: None, engine_name="ray")
    return digests(place)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(corpus, tmp_path):
    assert by_ray(corpus, tmp_path) == alone(corpus, tmp_path)


def test_without_ray_the_extra_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="the engine ray is not installed: pip install"):
        by_ray(corpus, tmp_path)


def test_an_unknown_engine_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="no engine 'spark': choose processes or ray"):
        tokenization.tokenize(
            corpus, str(tmp_path / "o"), "c", 5_000, str(tmp_path / "w"), 2, lambda *_: None, engine_name="spark"
        )
