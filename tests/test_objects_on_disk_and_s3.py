"""Bytes are published whole, listed and moved alike on a local disk and on S3."""

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage import objects


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_store")


def test_what_is_published_can_be_read_listed_and_removed(root: str) -> None:
    objects.publish_bytes(objects.join(root, "a/b.txt"), b"hello")
    objects.publish_json(objects.join(root, "c.json"), {"x": 1})
    assert objects.read_text(objects.join(root, "a/b.txt")) == "hello"
    assert objects.read_json(objects.join(root, "c.json")) == {"x": 1}
    assert [(s.path, s.bytes) for s in objects.list_files(root)] == [("a/b.txt", 5), ("c.json", 13)]
    assert [s.path for s in objects.list_files(root, suffix=".json")] == ["c.json"]
    objects.remove(objects.join(root, "c.json"))
    assert not objects.exists(objects.join(root, "c.json"))
    objects.remove_tree(root)
    assert objects.list_files(root) == []


def test_a_listing_shows_what_another_process_just_wrote(root: str) -> None:
    assert objects.list_files(root) == []
    objects.publish_bytes(objects.join(root, "late"), b"1")
    assert [s.path for s in objects.list_files(root)] == ["late"]


def test_only_the_first_of_two_creates_an_exclusive_object(root: str) -> None:
    claim = objects.join(root, "claim")
    assert objects.create_exclusive(claim, b"first")
    assert not objects.create_exclusive(claim, b"second")
    assert objects.read_bytes(claim) == b"first"
    assert (objects.read_bytes(claim, 3), objects.read_bytes(claim, 9)) == (b"st", b"")


def test_an_object_that_is_replaced_while_it_is_read_is_whole(root: str) -> None:
    contents, ended = [b"a" * 100, b"b" * 200], threading.Event()

    def replace() -> None:
        while not ended.is_set():
            for content in contents:
                objects.publish_bytes(f"{root}/claim", content)

    objects.publish_bytes(f"{root}/claim", contents[0])
    writer = threading.Thread(target=replace)
    writer.start()
    try:
        assert {objects.read_bytes(f"{root}/claim") for _ in range(50)} <= set(contents)
    finally:
        ended.set()
        writer.join()


def test_the_stamp_of_an_object_changes_with_its_content(root: str) -> None:
    url = objects.join(root, "x")
    objects.publish_bytes(url, b"one")
    before = objects.stat(url)
    time.sleep(0.02)  # a tick of the clock that older kernels stamp files with
    objects.publish_bytes(url, b"two")
    assert objects.stat(url).bytes == before.bytes
    assert objects.stat(url).modified != before.modified


def test_a_tree_is_copied_between_disk_and_store_and_back(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("one", "deep/two"):
        objects.publish_bytes(str(source / name), name.encode())
    objects.copy_tree(str(source), objects.join(root, "tree"))
    objects.copy_tree(objects.join(root, "tree"), str(tmp_path / "back"))
    assert (tmp_path / "back/deep/two").read_bytes() == b"deep/two"
    assert [s.path for s in objects.list_files(root)] == ["tree/deep/two", "tree/one"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        objects.publish_file(str(tmp_path / "absent"), str(tmp_path / "out/there"))
    assert objects.list_files(str(tmp_path)) == []


def test_a_store_that_cannot_be_written_is_refused_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="can't be written .*--store"):
        objects.check_writable(str(tmp_path / "file" / "store"))


def test_a_bucket_that_is_not_there_is_refused_with_the_fix(s3_store: str) -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        objects.check_writable("s3://no-such-bucket-here/store")


@pytest.mark.parametrize("url", ["s3://", "s3:///store", "s3:/bucket/store", "s3:"])
def test_an_address_without_a_bucket_is_no_local_folder(url: str) -> None:
    with pytest.raises(ValueError, match=f"{url} is no place on S3: write s3://bucket/prefix"):
        objects.is_local(url)


def test_other_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="only local paths and s3://"):
        objects.exists("gs://bucket/x")


def test_files_that_others_rename_while_they_are_listed_are_no_error(tmp_path: Path) -> None:
    """As a checkpoint's are, when each rank puts its own in place and the first one looks whether all are there."""
    stop = threading.Event()

    def rename() -> None:
        (tmp_path / "a").touch()
        while not stop.is_set():
            (tmp_path / "a").rename(tmp_path / "b")
            (tmp_path / "b").rename(tmp_path / "a")

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        for _ in range(2000):
            assert len(objects.list_files(str(tmp_path))) <= 2
    finally:
        stop.set()
        thread.join()


def test_a_full_disk_is_told_from_other_errors_whoever_meets_it() -> None:
    with pytest.raises(OSError) as of_a_file, open("/dev/full", "w") as full:
        full.write("x")
    with pytest.raises(sa.exc.OperationalError) as of_a_database, sa.create_engine("sqlite://").connect() as runs:
        runs.execute(sa.text("PRAGMA max_page_count = 1"))
        runs.execute(sa.text("CREATE TABLE runs (id)"))
    for met, said in ((of_a_file, "No space left on device"), (of_a_database, "database or disk is full")):
        refusal = objects.refusal(met.value)
        assert refusal.startswith("the disk is full (") and said in refusal and "\n" not in refusal
        reported = RuntimeError("a step failed")
        reported.__cause__ = met.value
        assert objects.refusal(reported) == refusal
    assert objects.refusal(FileNotFoundError(2, "No such file or directory")) == ""
    assert objects.refusal(RuntimeError("a process failed, which had said: No space left on device")) == ""


def test_errors_that_stand_behind_each_other_are_looked_at_once() -> None:
    """As what a broken pool of processes raises does."""
    one, other = OSError("one"), ValueError("other")
    one.__context__, other.__cause__ = other, one
    told: list[str] = []
    looking = threading.Thread(target=lambda: told.append(objects.refusal(one)), daemon=True)
    looking.start()
    looking.join(10)
    assert told == [""]
