"""What `datasets` loads becomes a corpus like any other; here from a folder of jsonl, without the hub."""

import json

import pyarrow.parquet as pq
import pytest

from storage import library_source, objects, parquet, sources

ROWS = [{"text": f"document {n} " * 20, "url": f"u/{n}", "stars": n} for n in range(2500)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "reviews").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "reviews" / "train.jsonl").write_text(lines)
    return tmp_path / "reviews"


def test_rows_come_in_order_with_the_columns_that_are_read(folder, tmp_path):
    source = sources.resolve(f"datasets:{folder}")
    files = source.fetch(str(tmp_path / "out"), lambda *_: None, str(tmp_path / "downloads" / source.name))
    table = pq.read_table(tmp_path / "out" / files[0].path)
    assert table.column_names == ["text", "url"]
    assert table["text"].to_pylist() == [row["text"] for row in ROWS]
    assert pq.ParquetFile(tmp_path / "out" / files[0].path).metadata.num_row_groups == 3


def test_a_large_dataset_becomes_several_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(library_source, "FILE_TEXT", 200_000)
    seen = []
    source = sources.resolve(f"datasets:{folder}::train")
    files = source.fetch(str(tmp_path / "out"), lambda *state: seen.append(state))
    urls = [objects.join(str(tmp_path / "out"), f.path) for f in files]
    assert len(files) == 3 and seen[-1][0] == sum(f.bytes for f in files)
    assert [t for b in parquet.documents(urls) for t in parquet.texts(b)] == [row["text"] for row in ROWS]


def test_ids_that_are_numbers_are_kept_and_texts_must_be_strings(folder, tmp_path):
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": "x", "id": n}) + "\n" for n in range(3)))
    (file,) = sources.resolve(f"datasets:{folder}").fetch(str(tmp_path / "out"), lambda *_: None)
    assert pq.read_table(tmp_path / "out" / file.path)["id"].to_pylist() == ["0", "1", "2"]
    (folder / "train.jsonl").write_text(json.dumps({"text": 7}))
    with pytest.raises(ValueError, match="has a text that is no string: 7"):
        sources.resolve(f"datasets:{folder}").fetch(str(tmp_path / "other"), lambda *_: None)


def test_its_content_is_its_identity(folder):
    before = sources.resolve(f"datasets:{folder}")
    (folder / "train.jsonl").write_text(json.dumps(ROWS[0]))
    after = sources.resolve(f"datasets:{folder}")
    assert before.name != after.name and before.identity != after.identity


def test_what_can_not_be_read_is_named(folder, tmp_path, monkeypatch):
    (folder / "train.jsonl").write_text(json.dumps({"content": "x"}))
    with pytest.raises(ValueError, match="has no column `text`, only content"):
        sources.resolve(f"datasets:{folder}").fetch(str(tmp_path / "out"), lambda *_: None)
    with pytest.raises(ValueError, match="names no dataset"):
        sources.resolve("datasets:")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(library_source.hub, "LONGEST_WAIT", 0.0)
    with pytest.raises(ValueError, match="check the network"):
        sources.resolve("datasets:nobody/nothing")
