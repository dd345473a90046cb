"""The real client against a hub on loopback: cut connections, busy answers, wrong bytes, a moved revision."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import LocalHub
from tiny_run import wait_for

from storage import hub, objects, shards, sources
from storage.parquet import FOOTER_BYTES, total_text_bytes
from training import tokenization

REPO = "HuggingFaceFW/fineweb-edu"


def parquet(texts: list[str], column: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: texts, "id": list(map(str, range(len(texts))))}), sink, compression="none")
    return sink.getvalue()


FILES = {
    f"sample/10BT/{i:03d}_00000.parquet": parquet([f"file {i} document {d} " * 20 for d in range(200)])
    for i in range(3)
}


CRAWL = {"data/CC-MAIN-2024-10/000.parquet": FILES["sample/10BT/000_00000.parquet"]}


@pytest.fixture
def local(monkeypatch):
    with LocalHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
        server.publish(REPO, "c0ffee", {**FILES, **CRAWL, "README.md": b"read me"})
        yield server


def fetch(corpus: str, out: Path | str, progress=lambda *_: None, scratch: str = "") -> list:
    return sources.resolve(corpus).fetch(str(out), progress, scratch)


def ranges(server: LocalHub) -> list[str]:
    return [r for _, path, r in server.requests if "/resolve/" in path]


def test_the_files_of_a_sample_come_with_their_digests(local, tmp_path):
    seen = []
    files = fetch("fineweb-edu-10B", tmp_path, lambda *state: seen.append(state))
    assert [f.path for f in files] == ["000_00000.parquet", "001_00000.parquet", "002_00000.parquet"]
    for file, data in zip(files, FILES.values(), strict=True):
        assert (tmp_path / file.path).read_bytes() == data
        assert file.sha256 == hashlib.sha256(data).hexdigest()
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f.path for f in files]


def test_a_crawl_a_dataset_and_the_first_files_have_names(local, tmp_path):
    assert sources.resolve("fineweb-edu:CC-MAIN-2024-10").name.startswith("fineweb-edu-CC-MAIN-2024-10-")
    assert len(sources.resolve("fineweb-edu-10B:2").identity["files"]) == 2
    assert sources.first_files("fineweb-edu-10B@c0ffee", 2) == "fineweb-edu-10B@c0ffee:2"
    assert sources.first_files("fineweb-edu:CC-MAIN-2024-10:3", 1) == "fineweb-edu:CC-MAIN-2024-10:1"
    with pytest.raises(ValueError, match="--files 1 takes the first files of a corpus on the hub"):
        sources.first_files("embedded", 1)
    source = sources.resolve(f"hf://datasets/{REPO}/sample/10BT:1")
    assert source.identity["files"] == sources.resolve("fineweb-edu-10B:1").identity["files"]
    assert sources.resolve("fineweb-edu-10B@c0ffee").identity == sources.resolve("fineweb-edu-10B").identity


def test_a_tree_of_several_pages_is_read_to_its_end(local):
    local.page = 2
    assert [e.path for e in hub.list_tree(REPO, "c0ffee", "sample/10BT")] == sorted(FILES)


def test_cut_connections_are_resumed_where_they_broke(local, tmp_path):
    local.cut_after = 40_000
    fetch("fineweb-edu-10B:1", tmp_path)
    data = FILES["sample/10BT/000_00000.parquet"]
    assert (tmp_path / "000_00000.parquet").read_bytes() == data
    assert ranges(local) == ["", *[f"bytes={n}-" for n in range(40_000, len(data), 40_000)]]


def test_a_server_without_ranges_still_gives_whole_files(local, tmp_path):
    (tmp_path / "000_00000.parquet.part").write_bytes(b"half of it")
    local.ignore_range = True
    fetch("fineweb-edu-10B:1", tmp_path)
    assert (tmp_path / "000_00000.parquet").read_bytes() == FILES["sample/10BT/000_00000.parquet"]


def test_a_part_longer_than_its_file_is_thrown_away(local, tmp_path):
    (tmp_path / "000_00000.parquet.part").write_bytes(b"x" * 1_000_000)
    with pytest.raises(ValueError, match="longer than"):
        fetch("fineweb-edu-10B:1", tmp_path)
    fetch("fineweb-edu-10B:1", tmp_path)
    assert (tmp_path / "000_00000.parquet").read_bytes() == FILES["sample/10BT/000_00000.parquet"]


def test_busy_answers_are_waited_out_as_long_as_they_ask(local, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LONGEST_WAIT", 300.0)
    source = sources.resolve("fineweb-edu-10B:1")
    local.busy, local.retry_after = 2, "1"
    began = time.monotonic()
    source.fetch(str(tmp_path), lambda *_: None)
    assert time.monotonic() - began >= 2.0 and len(ranges(local)) == 3


@pytest.mark.parametrize("what", ["files", "their ends"])
def test_ctrl_c_does_not_wait_for_a_busy_hub(local, tmp_path, monkeypatch, what):
    monkeypatch.setattr(hub, "LONGEST_WAIT", 300.0)
    source = sources.resolve("fineweb-edu-10B")
    local.busy, local.retry_after = 100, "200"

    def press() -> None:
        wait_for(lambda: len(ranges(local)) == 3)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.fetch(str(tmp_path), lambda *_: None) if what == "files" else source.text_bytes(10**12)
    pressing.join()
    assert time.monotonic() - began < 150


def test_ctrl_c_amid_the_start_of_downloads_does_not_wait_for_a_busy_hub(local, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LONGEST_WAIT", 300.0)
    listed = hub.list_tree(REPO, "c0ffee", "sample/10BT")
    local.busy, local.retry_after = 100, "200"

    def entries():
        yield from listed[:2]
        wait_for(lambda: len(ranges(local)) == 2)
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(REPO, "c0ffee", entries(), str(tmp_path), lambda _: None)
    assert time.monotonic() - began < 150


def test_an_answer_that_breaks_off_is_asked_for_again(local):
    local.cut_answers = 3
    assert len(sources.resolve("fineweb-edu-10B").identity["files"]) == 3
    local.cut_answers = 4
    with pytest.raises(hub.Unreachable, match="can't be had after 4 attempts .* check the network"):
        sources.resolve("fineweb-edu-10B")
    assert local.cut_answers == 0


def test_an_answer_that_stops_coming_is_asked_for_again(local, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 2.0)
    local.silent_answers = 1
    assert hub.commit_of(REPO) == "c0ffee"
    assert len(local.requests) > 1


def test_wrong_bytes_are_fetched_again_and_never_kept(local, tmp_path):
    local.wrong_bytes = 1
    fetch("fineweb-edu-10B:1", tmp_path / "once")
    assert (tmp_path / "once" / "000_00000.parquet").read_bytes() == FILES["sample/10BT/000_00000.parquet"]
    local.wrong_bytes = 2
    with pytest.raises(ValueError, match="twice came with sha256"):
        fetch("fineweb-edu-10B:1", tmp_path / "twice")
    assert list((tmp_path / "twice").iterdir()) == []


def test_whole_files_are_not_asked_for_again(local, tmp_path):
    fetch("fineweb-edu-10B", tmp_path)
    local.requests.clear()
    fetch("fineweb-edu-10B", tmp_path)
    assert ranges(local) == []


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_file_that_was_damaged_since_is_fetched_again(local, tmp_path, where, request):
    out = f"{request.getfixturevalue('s3_store')}/documents" if where == "s3" else str(tmp_path / "documents")
    scratch = str(tmp_path / "scratch")
    fetch("fineweb-edu-10B:2", out, scratch=scratch)
    data = FILES["sample/10BT/001_00000.parquet"]
    objects.publish_bytes(f"{out}/001_00000.parquet", data[:500] + bytes([data[500] ^ 1]) + data[501:])
    local.requests.clear()
    files = fetch("fineweb-edu-10B:2", out, scratch=scratch)
    assert ranges(local) == [""]
    assert [objects.sha256(f"{out}/{f.path}") for f in files] == [f.sha256 for f in files]


def test_a_moved_revision_with_the_same_files_is_the_same_corpus(local, tmp_path):
    before = sources.resolve("fineweb-edu-10B")
    local.publish(REPO, "beef", {**FILES, "README.md": b"new words"})
    after = sources.resolve("fineweb-edu-10B")
    assert (before.name, before.identity) == (after.name, after.identity)
    assert (before.details["revision"], after.details["revision"]) == ("c0ffee", "beef")
    before.fetch(str(tmp_path), lambda *_: None)  # the old commit is still there
    changed = {**FILES, "sample/10BT/000_00000.parquet": parquet(["other"])}
    local.publish(REPO, "f00d", changed)
    assert sources.resolve("fineweb-edu-10B").name != before.name


def test_files_go_on_to_s3(local, tmp_path, s3_store):
    out = f"{s3_store}/corpora/c/documents"
    files = fetch("fineweb-edu-10B:2", out, scratch=str(tmp_path / "scratch"))
    assert [objects.sha256(f"{out}/{f.path}") for f in files] == [f.sha256 for f in files]
    assert [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()] == []


def test_other_downloads_stop_where_one_fails(local, tmp_path, monkeypatch):
    """They are not brought to their end, hours later, and go on where they were."""
    slow = "sample/10BT/001_00000.parquet"
    held = local.held[slow] = threading.Event()
    asked = local.asked[slow] = threading.Event()

    class Stopped(threading.Event):
        def set(self) -> None:
            super().set()
            held.set()  # its first bytes come once it is to stop

    monkeypatch.setattr(hub, "Event", Stopped)

    def refuse(entry: hub.Entry, path: str) -> None:
        assert asked.wait(60)
        raise KeyboardInterrupt

    entries = hub.list_tree(REPO, "c0ffee", "sample/10BT")[:2]
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(REPO, "c0ffee", entries, str(tmp_path), lambda _: None, refuse)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000_00000.parquet", "001_00000.parquet.part"]
    fetch("fineweb-edu-10B:2", tmp_path)
    assert (tmp_path / "001_00000.parquet").read_bytes() == FILES[slow]


CHILD = "import sys; from storage.sources import resolve; resolve(sys.argv[1]).fetch(sys.argv[2], lambda *_: 0)"


def test_another_process_goes_on_after_a_kill(local, tmp_path):
    local.cut_after = 1_000  # and a pause after each such part
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", CHILD, "fineweb-edu-10B:1", str(tmp_path)]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    part = tmp_path / "000_00000.parquet.part"
    while child.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    child.kill()
    child.wait()
    held = part.stat().st_size
    local.requests.clear()
    local.cut_after = 0
    fetch("fineweb-edu-10B:1", tmp_path)
    assert ranges(local) == [f"bytes={held}-"]
    assert (tmp_path / "000_00000.parquet").read_bytes() == FILES["sample/10BT/000_00000.parquet"]


def test_a_token_goes_with_each_request(local, tmp_path, monkeypatch):
    local.token = "hf_secret"
    with pytest.raises(ValueError, match="401 .* set HF_TOKEN"):
        sources.resolve("fineweb-edu-10B")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("fineweb-edu-10B:1", tmp_path)


def test_a_redirect_to_the_cdn_keeps_the_range_and_drops_the_token(local, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    local.token = "hf_secret"
    with LocalHub(local.repos, local.heads, cut_after=40_000) as cdn:
        local.content_at = cdn.url
        fetch("fineweb-edu-10B:1", tmp_path)
        assert ranges(cdn)[:2] == ["", "bytes=40000-"]
        assert set(cdn.tokens_seen) == {""}
    assert set(local.tokens_seen) == {"Bearer hf_secret"}
    assert (tmp_path / "000_00000.parquet").read_bytes() == FILES["sample/10BT/000_00000.parquet"]


def test_what_is_not_there_is_named_with_the_fix(local, monkeypatch):
    with pytest.raises(ValueError, match="dataset a/b at main is not to be had .* check its name"):
        sources.resolve("hf://datasets/a/b")
    with pytest.raises(ValueError, match="folder data/CC-MAIN-1999-01 .* HTTP 404"):
        sources.resolve("fineweb-edu:CC-MAIN-1999-01")
    with pytest.raises(ValueError, match=r"no .parquet file in its root"):
        sources.resolve(f"hf://datasets/{REPO}")
    with pytest.raises(ValueError, match="did you mean fineweb-edu-10B"):
        sources.resolve("fineweb-edu-10b")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="can't be had after 4 attempts .* check the network"):
        sources.resolve("fineweb-edu-10B")


def test_parquet_without_text_is_refused_when_it_comes(local, tmp_path):
    local.publish("o/n", "1", {"a.parquet": parquet(["x"], column="content")})
    for _ in range(2):  # the second time without fetching it again
        with pytest.raises(ValueError, match="has no column `text`"):
            fetch("hf://datasets/o/n", tmp_path)
    assert len(ranges(local)) == 1 and not (tmp_path / "a.parquet").exists()


def shard(tokens: list[int], magic: int = shards.MAGIC) -> bytes:
    return shards.header(magic, len(tokens)) + np.array(tokens, dtype="<u2").tobytes()


def test_pretokenized_shards_come_validation_first_and_checked(local, tmp_path):
    repo = "karpathy/fineweb-edu-100B-gpt2-token-shards"
    train = {f"edu_fineweb_train_{i:06d}.bin": shard([50256, i]) for i in range(1, 4)}
    local.publish(repo, "1", {**train, "edu_fineweb_val_000000.bin": shard([50256, 9, 9])})
    source = sources.resolve("fineweb-edu-100B-tokens:2")
    assert source.kind == "tokens"
    files = source.fetch(str(tmp_path), lambda *_: None)
    assert [f.path for f in files] == ["edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin"]
    assert shards.open_shard(shards.shard_paths(str(tmp_path), "val")[0]).tolist() == [50256, 9, 9]
    local.publish(repo, "2", {**train, "edu_fineweb_val_000000.bin": shard([1], magic=7)})
    with pytest.raises(ValueError, match="is no token shard"):
        fetch("fineweb-edu-100B-tokens", tmp_path / "broken")


def test_a_validation_shard_alone_is_no_corpus(local):
    files = {f"edu_fineweb_{name}.bin": shard([50256]) for name in ("val_000000", "train_000001")}
    local.publish("karpathy/fineweb-edu-100B-gpt2-token-shards", "1", files)
    with pytest.raises(ValueError, match="first 1 files of fineweb-edu-100B-tokens are not .* take --files 2 or more"):
        sources.resolve("fineweb-edu-100B-tokens:1")
    assert len(sources.resolve("fineweb-edu-100B-tokens:2").identity["files"]) == 2


def test_bytes_of_text_are_known_before_the_files_come(local, tmp_path):
    """From their ends alone, also where metadata are longer than what was asked for first."""
    rows = pa.table({"text": [f"number {n} " * 9 for n in range(3000)]})
    pq.write_table(rows, tmp_path / "many_groups.parquet", row_group_size=4)
    data = (tmp_path / "many_groups.parquet").read_bytes()
    assert int.from_bytes(data[-8:-4], "little") > 2 * FOOTER_BYTES
    local.publish("o/n", "1", {"a.parquet": data, "b.parquet": parquet(["x" * 100_000])})
    source = sources.resolve("hf://datasets/o/n")
    found = source.text_bytes(10**12)
    asked = [int(r.removeprefix("bytes=").rstrip("-")) for r in ranges(local) if r]
    assert min(asked) > 0 and len(ranges(local)) == 3
    files = [f"{tmp_path}/fetched/{f.path}" for f in source.fetch(f"{tmp_path}/fetched", lambda *_: None)]
    assert found == total_text_bytes(files)
    assert 0 < source.text_bytes(1) < found
    local.publish("o/none", "1", {"a.parquet": parquet(["x" * 100_000], column="content")})
    with pytest.raises(ValueError, match=r"a.parquet has no column `text`"):
        sources.resolve("hf://datasets/o/none").text_bytes(1)


@pytest.mark.slow
def test_files_become_shards_while_others_are_fetched(local, tmp_path, monkeypatch):
    """What is made ahead is used, and changes nothing."""
    held = local.held["sample/10BT/002_00000.parquet"] = threading.Event()
    source = sources.resolve("fineweb-edu-10B")
    out, work, ended = str(tmp_path / "documents"), tmp_path / "work", threading.Event()
    given = (lambda: source.whole(out), str(tmp_path / "work-out"), "c", 10_000, str(work), 1, lambda *_: None, ended)
    ahead = threading.Thread(target=tokenization.tokenize_ahead, args=given)
    ahead.start()
    fetching = threading.Thread(target=source.fetch, args=(out, lambda *_: None))
    fetching.start()
    made = tmp_path / "work-out" / "c_train_000001.bin"
    while not made.exists():
        time.sleep(0.05)
    assert len(source.whole(out)) == 2 and not (made.parent / shards.COMPLETE).exists()
    written = made.stat().st_mtime_ns
    held.set()
    fetching.join()
    ended.set()
    ahead.join()
    encoded = []
    encode = tokenization.encode_piece
    monkeypatch.setattr(tokenization, "encode_piece", lambda *given: encoded.append(given[1].index) or encode(*given))
    files = source.whole(out)
    for place in (work, tmp_path / "other-work"):
        folder = str(tmp_path / f"{place.name}-out")
        tokenization.tokenize(files, folder, "c", 10_000, str(place), 1, lambda *_: None)
    assert encoded in ([2, 0, 1, 2], [0, 1, 2]) and made.stat().st_mtime_ns == written
    one, other = (tmp_path / name for name in ("work-out", "other-work-out"))
    names = [p.name for p in one.iterdir() if p.suffix in (".bin", ".parquet")]
    assert len(names) > 4 and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)
