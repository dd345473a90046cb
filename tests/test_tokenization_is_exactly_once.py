"""Shards hold each document once, in order, whatever the workers, the piece sizes or the kills."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import wait_for

from storage import objects, shards, tokenizer
from training import pieces, tokenization

SHARD_TOKENS = 7_000
WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files of several row groups, 400 documents, in FineWeb-Edu's columns as far as they are read."""
    folder = tmp_path_factory.mktemp("corpus")
    choose = random.Random(3)
    texts = [" ".join(choose.choices(WORDS, k=choose.randrange(0, 300))) for _ in range(400)]
    for number, (first, last) in enumerate([(0, 150), (150, 160), (160, 400)]):
        table = pa.table(
            {
                "text": texts[first:last],
                "id": [f"id-{i}" for i in range(first, last)],
                "dump": ["d"] * (last - first),
                "url": [f"u/{i}" for i in range(first, last)],
            }
        )
        pq.write_table(table, folder / f"{number:03d}_00000.parquet", row_group_size=40)
    return sorted(map(str, folder.iterdir())), texts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_TEXT", 40_000)


def run(files, folder: Path, workers: int = 1, shard_tokens: int = SHARD_TOKENS, progress=lambda *_: None):
    return tokenization.tokenize(files, str(folder / "out"), "c", shard_tokens, str(folder / "work"), workers, progress)


def digests(out) -> dict[str, str]:
    return {s.path: objects.sha256(f"{out}/{s.path}") for s in objects.list_files(str(out)) if s.path.startswith("c_")}


def digests_of(made: tokenization.Tokenized) -> dict[str, str]:
    return {f.path: f.sha256 for f in made.files}


def stream(out) -> list[int]:
    paths = [*shards.shard_paths(str(out), "val"), *shards.shard_paths(str(out), "train")]
    return np.concatenate([shards.open_shard(p) for p in paths]).tolist()


def expected_stream(texts: list[str]) -> list[int]:
    encoding = tokenizer.encoding()
    return [t for text in texts for t in [50256, *encoding.encode_ordinary(text)]]


def test_shards_are_the_documents_in_order_with_eot_before_each(corpus, tmp_path):
    files, texts = corpus
    made = run(files, tmp_path)
    assert stream(tmp_path / "out") == expected_stream(texts)
    assert (made.tokens, made.documents) == (len(expected_stream(texts)), 400)
    full = [shards.read_header(p) for p in shards.shard_paths(str(tmp_path / "out"), "train")]
    assert set(full[:-1]) == {SHARD_TOKENS} and 0 < full[-1] <= SHARD_TOKENS
    assert made.shards == len(full) + 1 == -(-made.tokens // SHARD_TOKENS)


def test_the_described_files_are_what_lies_there(corpus, tmp_path):
    made = run(corpus[0], tmp_path)
    assert digests_of(made) == digests(tmp_path / "out")
    for file in made.files:
        stat = objects.stat(str(tmp_path / "out" / file.path))
        assert (stat.bytes, stat.modified) == (file.bytes, file.modified)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_no_byte(corpus, tmp_path, workers):
    run(corpus[0], tmp_path / "one")
    run(corpus[0], tmp_path / "many", workers)
    assert digests(tmp_path / "many" / "out") == digests(tmp_path / "one" / "out")


@pytest.mark.parametrize(("setting", "size"), [("PIECE_TEXT", 1), ("PIECE_TEXT", 10_000_000), ("BATCH_TEXT", 5_000)])
@pytest.mark.parametrize("rows_together", [16, pieces.INDEX_ROWS])
def test_the_size_of_pieces_and_batches_changes_no_byte(corpus, tmp_path, monkeypatch, setting, size, rows_together):
    monkeypatch.setattr(pieces, "INDEX_ROWS", rows_together)
    run(corpus[0], tmp_path / "one")
    index = pq.read_metadata(tmp_path / "one" / "out" / "c_val_000000.documents.parquet")
    assert index.num_row_groups == -(-index.num_rows // rows_together)
    monkeypatch.setattr(pieces, setting, size)
    run(corpus[0], tmp_path / "other")
    assert digests(tmp_path / "other" / "out") == digests(tmp_path / "one" / "out")


def test_a_finished_corpus_is_not_encoded_again(corpus, tmp_path, monkeypatch):
    first = run(corpus[0], tmp_path)
    monkeypatch.setattr(tokenization, "encode_piece", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(tokenization, "cut_shard", lambda *_: pytest.fail("cut again"))
    assert run(corpus[0], tmp_path) == first


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bytes_of_another_time_are_the_same_corpus(tmp_path, monkeypatch, shared):
    """Of a file that was touched, or of another machine's copy."""
    file = tmp_path / "0.parquet"
    pq.write_table(pa.table({"text": ["alpha beta " * 2000] * 2}), file)
    again = partial(tokenization.tokenize, [str(file)], str(tmp_path / "out"), "c", 2_500, str(tmp_path / "work"), 1)
    first = again(lambda *_: None, shared=shared)
    os.utime(file, (1, 1))
    monkeypatch.setattr(tokenization, "encode_piece", lambda *_: pytest.fail("encoded again"))
    assert again(lambda *_: None, shared=shared) == first


def test_no_scratch_tokens_stay_behind(corpus, tmp_path):
    run(corpus[0], tmp_path)
    assert [p.name for p in (tmp_path / "work").rglob("*") if p.is_file()] == ["lock"]


def test_used_pieces_are_removed_once(corpus, tmp_path, monkeypatch):
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (removed.append(path), unlink(path, missing_ok)))
    run(corpus[0], tmp_path)
    assert len(removed) == len(set(removed)) > 10


def test_a_removed_shard_is_made_again(corpus, tmp_path):
    run(corpus[0], tmp_path)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "c_train_000003.bin").unlink()
    run(corpus[0], tmp_path)
    assert digests(tmp_path / "out") == before


def damage(shard: Path) -> None:
    """Change one bit of it, and not its size."""
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)


def test_a_damaged_shard_is_made_again(corpus, tmp_path):
    before = digests_of(run(corpus[0], tmp_path))
    damage(tmp_path / "out" / "c_train_000003.bin")
    assert digests_of(run(corpus[0], tmp_path)) == digests(tmp_path / "out") == before


def test_lost_scratch_space_costs_time_but_no_byte(corpus, tmp_path):
    run(corpus[0], tmp_path)
    before = digests(tmp_path / "out")
    objects.remove_tree(str(tmp_path / "work"))
    run(corpus[0], tmp_path)
    assert digests(tmp_path / "out") == before


def test_another_shard_size_leaves_nothing_of_the_old_one(corpus, tmp_path):
    run(corpus[0], tmp_path, shard_tokens=3_000)
    run(corpus[0], tmp_path)
    run(corpus[0], tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh" / "out")


def test_a_changed_file_is_encoded_again(corpus, tmp_path):
    copy = tmp_path / "copy.parquet"
    pq.write_table(pa.table({"text": ["alpha beta " * 2000] * 2}), copy)
    run([str(copy)], tmp_path, shard_tokens=2_500)
    pq.write_table(pa.table({"text": ["gamma delta " * 2000] * 2}), copy)
    run([str(copy)], tmp_path, shard_tokens=2_500)
    assert stream(tmp_path / "out") == expected_stream(["gamma delta " * 2000] * 2)


def test_progress_ends_at_all_tokens_and_all_bytes(corpus, tmp_path):
    seen = []
    made = run(corpus[0], tmp_path, progress=lambda *state: seen.append(state))
    assert seen == sorted(seen) and len(seen) > 3
    assert seen[0][:2] == (0, 0) and seen[-1] == (made.tokens, seen[-1][2], seen[-1][2])


CHILD = """
import pathlib, sys, time
from training import pieces, tokenization
pieces.PIECE_TEXT = 40_000
out, work, workers, reports, *files = sys.argv[1:]
enough, write_index = pathlib.Path(work + ".enough"), pieces.write_index
def hold(*arguments):
    while enough.exists():
        time.sleep(1)
    return write_index(*arguments)
pieces.write_index = hold
if __name__ == "__main__":
    seen = []
    def report(*state):
        seen.append(state)
        if len(seen) == int(reports):
            enough.touch()
            print("enough", flush=True)
    tokenization.tokenize(files, out, "c", 7_000, work, int(workers), report)
"""


def start(script: Path, folder: Path, workers: int, reports: int, files: list[str]) -> subprocess.Popen[str]:
    """A tokenization that has given so many reports, and does not come to the end of another piece."""
    script.write_text(CHILD)
    (folder / "work.enough").unlink(missing_ok=True)
    command = [sys.executable, str(script), str(folder / "out"), str(folder / "work"), str(workers), str(reports)]
    root = str(Path(__file__).resolve().parent.parent)
    child = subprocess.Popen(
        [*command, *files],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        start_new_session=True,
    )
    assert child.stdout and child.stdout.readline() == "enough\n"
    return child


@pytest.mark.parametrize(("workers", "reports"), [(1, (1, 3)), pytest.param(2, (1, 4), marks=pytest.mark.slow)])
def test_killed_and_resumed_is_byte_identical(corpus, tmp_path, workers, reports):
    run(corpus[0], tmp_path / "whole")
    for count in reports:
        child = start(tmp_path / "child.py", tmp_path / "killed", workers, count, corpus[0])
        child.kill()
        child.communicate()
        assert (tmp_path / "killed" / "out" / "plan.json").exists()
        assert child.returncode == -signal.SIGKILL
    run(corpus[0], tmp_path / "killed", workers)
    assert digests(tmp_path / "killed" / "out") == digests(tmp_path / "whole" / "out")
    assert [p.name for p in (tmp_path / "killed" / "work").iterdir()] == ["lock"]


def test_killed_before_it_said_that_all_is_complete(corpus, tmp_path, monkeypatch):
    """Pieces and shards are all there, the last word is not."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenization._Job, "_complete", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run(corpus[0], tmp_path)
    assert not (tmp_path / "out" / "complete.json").exists()
    before = digests(tmp_path / "out")
    damage(tmp_path / "out" / "c_train_000003.bin")
    assert digests_of(run(corpus[0], tmp_path)) == digests(tmp_path / "out") == before
    assert (tmp_path / "out" / "complete.json").exists()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["lock"]


def ahead(files: list[str], folder: Path, until: Callable[[list[int]], bool]) -> list[int]:
    """Tokenize files that come one by one, until what has been seen is enough -> tokens after each piece."""
    ended, seen, here = threading.Event(), [0], iter(range(1, len(files) + 1))

    def whole() -> list[str]:
        if until(seen):
            ended.set()
        return files[: next(here, len(files))]

    places = (str(folder / "out"), "c", SHARD_TOKENS, str(folder / "work"))
    tokenization.tokenize_ahead(whole, *places, 1, lambda tokens, *_: seen.append(tokens), ended)
    return seen


@pytest.mark.slow
def test_a_corpus_that_grows_ends_as_one_that_was_there(corpus, tmp_path):
    """Ended and gone on with: what is made stays, and no shard is cut before it is full."""
    files = corpus[0]
    whole = run(files, tmp_path / "whole")
    first = tmp_path / "out" / "c_val_000000.bin"
    ahead(files[:1], tmp_path, lambda _: first.exists())
    written = first.stat().st_mtime_ns
    seen = ahead(files, tmp_path, lambda seen: seen[-1] == whole.tokens)
    assert seen[1] >= SHARD_TOKENS and seen == sorted(seen)
    assert not (tmp_path / "out" / "complete.json").exists()
    assert {shards.read_header(p) for p in shards.shard_paths(str(tmp_path / "out"), "train")} == {SHARD_TOKENS}
    made = run(files, tmp_path)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole" / "out") == digests_of(made)
    assert first.stat().st_mtime_ns == written


def test_workers_end_with_a_killed_parent(corpus, tmp_path):
    child = start(tmp_path / "child.py", tmp_path / "killed", 2, 2, corpus[0])  # a piece is complete: they are up
    assert len(group_members(child.pid)) > 1
    child.kill()
    wait_for(lambda: group_members(child.pid) == [])
    child.communicate()


def test_a_run_waits_for_the_workers_of_a_killed_one(corpus, tmp_path):
    """They may still write into the scratch folder, whose leftovers it removes."""
    child = start(tmp_path / "child.py", tmp_path / "killed", 2, 2, corpus[0])
    workers = [int(pid) for pid in group_members(child.pid) if int(pid) != child.pid]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    child.kill()
    child.wait()
    try:
        with open(tmp_path / "killed" / "work" / "lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    run(corpus[0], tmp_path / "killed")
    child.communicate()
    assert [p.name for p in (tmp_path / "killed" / "work").iterdir()] == ["lock"]


def group_members(group: int) -> list[str]:
    """Living processes of a process group, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_from_a_position_one_finds_the_document(corpus, tmp_path):
    files, texts = corpus
    run(files, tmp_path)
    for path in [
        *shards.shard_paths(str(tmp_path / "out"), "val"),
        *shards.shard_paths(str(tmp_path / "out"), "train"),
    ]:
        tokens = shards.open_shard(path)
        for position in (0, 1, len(tokens) // 2, len(tokens) - 1):
            found = tokenization.document_at(path, position)
            number = int(found["id"].removeprefix("id-"))
            whole = [50256, *tokenizer.encode(texts[number]).tolist()]
            assert found["tokens"] == len(whole) and found["url"] == f"u/{number}"
            assert tokens[position] == whole[position - found["start"]]
            row = pq.read_table(found["file"])["text"][found["row"]].as_py()
            assert row == texts[number]
        with pytest.raises(ValueError, match="has no token"):
            tokenization.document_at(path, len(tokens))


@pytest.mark.slow
def test_works_from_and_to_s3(corpus, tmp_path, s3_store):
    run(corpus[0], tmp_path / "local")
    urls = []
    for path in corpus[0]:
        urls.append(f"{s3_store}/documents/{Path(path).name}")
        objects.publish_file(path, urls[-1])
    out = f"{s3_store}/tokens/c"
    tokenization.tokenize(urls, out, "c", SHARD_TOKENS, str(tmp_path / "work"), 2, lambda *_: None)
    local, remote = digests(tmp_path / "local" / "out"), digests(out)
    assert {k: v for k, v in remote.items() if k.endswith(".bin")} == {
        k: v for k, v in local.items() if k.endswith(".bin")
    }


ODD = ["", "x" * 1_000_000, "say <|endoftext|> aloud", "nul\0nul", "", "\n\n", "日本語🙂", "plain " * 3000]


def test_odd_documents_decode_to_their_text(tmp_path):
    file = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"text": [*ODD, None]}), file)
    run([str(file)], tmp_path, shard_tokens=20_000)
    tokens = np.array(stream(tmp_path / "out"), dtype=np.uint16)
    starts = [*np.flatnonzero(tokens == 50256).tolist(), len(tokens)]
    texts = [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert texts == [*ODD, ""]


def test_bytes_that_are_no_utf8_become_replacement_characters(tmp_path):
    """A lone surrogate in a parquet file is three bytes that no decoder accepts."""
    file = tmp_path / "surrogate.parquet"
    raw = [b"before \xed\xa0\x80 after", b"fine " * 5000]
    column = pa.array(raw, pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    pq.write_table(pa.table({"text": broken}), file)
    run([str(file)], tmp_path, shard_tokens=3_000)
    assert stream(tmp_path / "out") == expected_stream([b.decode("utf-8", "replace") for b in raw])


def test_a_documents_id_may_be_a_number_or_any_bytes(tmp_path):
    ids = pa.array([b"\xff\xfe", None, b"whole"] * 5, pa.binary())
    pq.write_table(pa.table({"text": ["a b c"] * 15, "id": ids, "url": range(15)}), tmp_path / "x.parquet")
    run([str(tmp_path / "x.parquet")], tmp_path, shard_tokens=7)
    found = [row for index in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(index).to_pylist()]
    assert {(row["id"], row["url"]) for row in found if row["row"] < 3} == {
        ("\ufffd\ufffd", "0"),
        (None, "1"),
        ("whole", "2"),
    }


def test_large_strings_and_binary_columns_are_text_too(tmp_path):
    for name, kind in [("large", pa.large_string()), ("binary", pa.binary())]:
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": pa.array(["word " * 3000], kind)}), file)
        run([str(file)], tmp_path / name, shard_tokens=2_048)
        assert stream(tmp_path / name / "out") == expected_stream(["word " * 3000])


def test_a_corpus_that_one_shard_holds_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"the corpus has .* tokens, .* set tokenize.shard_tokens below"):
        run(corpus[0], tmp_path, shard_tokens=10_000_000)


@pytest.mark.parametrize(
    ("text_bytes", "tokens"),
    [(0, 2048), (2_000_000, 25_000), (10**12, 100_000_000), (208_000_000, 2_600_000)],
)
def test_the_automatic_shard_size_leaves_training_shards(text_bytes, tokens):
    assert tokenization.automatic_shard_tokens(text_bytes) == tokens


def test_token_counts_of_the_real_corpus(shared_data, tmp_path):
    """The corpus's own README gives its tokens without EOT, document by document."""
    file = shared_data / "validation" / "000_00000.parquet"
    made = run([str(file)], tmp_path, shard_tokens=100_000)
    assert made.tokens == 503_184 + 243
    index = pa.concat_tables(pq.read_table(p) for p in (tmp_path / "out").glob("*.documents.parquet"))
    index = index.filter(pa.compute.field("start") >= 0).sort_by("position")
    counted = pq.read_table(file, columns=["token_count"])["token_count"].to_numpy()
    assert (index["tokens"].to_numpy() - 1 == counted).all()
