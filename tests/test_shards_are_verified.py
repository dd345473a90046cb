"""Verification passes for what was tokenized and names what is wrong with anything else."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import batch_tokenizer, inspection, shards, tokenizer, verification
from training import pieces, tokenization

TEXTS = [f"document {n} says {'word ' * (n * 7 % 300)}" for n in range(120)] + ["", "Übergröße 🙂 \0"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"text": TEXTS, "id": [f"id {n}" for n in range(len(TEXTS))]}), path, row_group_size=17)
    tokenize(tmp_path)
    return tmp_path / "out"


def tokenize(folder):
    file = str(folder / "documents.parquet")
    tokenization.tokenize([file], str(folder / "out"), "c", 3_000, str(folder / "work"), 1, lambda *_: None)


def test_all_documents_are_their_text(folder):
    found = verification.verify(str(folder), sample=1_000)
    assert found.documents == found.compared == len(TEXTS)
    assert found.tokens == sum(1 + len(tokenizer.encode(text)) for text in TEXTS)
    assert found.shards == len(list(folder.glob("*.bin"))) > 3
    assert found.largest_token == tokenizer.EOT


def test_a_changed_token_is_found(folder):
    path = folder / "c_train_000002.bin"
    data = np.fromfile(path, dtype="<u2")
    data[600] = (data[600] + 1) % 50256
    data.tofile(path)
    with pytest.raises(ValueError, match=r"do not decode to row \d+ of .*documents.parquet"):
        verification.verify(str(folder), sample=1_000)


def test_changed_documents_are_found(folder, tmp_path):
    texts = [text.upper() for text in TEXTS]
    pq.write_table(pa.table({"text": texts}), tmp_path / "documents.parquet", row_group_size=17)
    with pytest.raises(ValueError, match="the documents have changed since"):
        verification.verify(str(folder))


def test_documents_that_are_gone_are_said(folder, tmp_path):
    (tmp_path / "documents.parquet").unlink()
    with pytest.raises(ValueError, match="documents.parquet is not there any more"):
        verification.verify(str(folder))


def test_a_store_is_verified_from_inside_by_a_relative_path(tmp_path, monkeypatch):
    """The indexes name the documents by their path in the store; none has an id, so names lead to them."""
    file = tmp_path / "corpora" / "c" / "documents.parquet"
    file.parent.mkdir(parents=True)
    texts = [" ".join(str(1000 * n + k) for k in range(60)) for n in range(len(TEXTS))]
    pq.write_table(pa.table({"text": texts}), file)
    out, work = str(tmp_path / "tokens" / "c"), str(tmp_path / "work")
    tokenization.tokenize([str(file)], out, "c", 3_000, work, 1, lambda *_: None, root=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert verification.verify("tokens/c").compared == 50
    here = inspection.validation_overlap(["corpora/c/documents.parquet"], "tokens/c")
    assert here == inspection.validation_overlap([str(file)], out)
    assert here.documents < len(TEXTS)  # those of the validation shard are left out


def test_a_cut_shard_is_found(folder):
    path = folder / "c_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="c_train_000001.bin is broken"):
        verification.verify(str(folder))


def test_shards_from_elsewhere_are_checked_without_their_documents(tmp_path):
    shards.write_shard(str(tmp_path / "edu_fineweb_val_000000.bin"), np.array([50256, 1], dtype=np.uint16))
    assert verification.verify(str(tmp_path)) == verification.Verified(1, 2, 50256, 0, 0)
    with pytest.raises(ValueError, match="holds no token shards"):
        verification.verify(str(tmp_path / "absent"))


def test_a_wrong_fast_tokenizer_is_replaced_by_tiktoken_with_a_warning(folder, tmp_path, monkeypatch, caplog):
    before = {p.name: p.read_bytes() for p in folder.glob("*.bin")}
    broken = batch_tokenizer.BatchTokenizer()
    broken.encode([TEXTS[1].encode()])
    broken.tokens[broken.starts[broken.numbers[b" word"]]] += 1
    monkeypatch.setattr(pieces, "batch_tokenizer", lambda: broken)
    for path in folder.iterdir():
        path.unlink()
    tokenize(tmp_path)
    assert {p.name: p.read_bytes() for p in folder.glob("*.bin")} == before
    assert "the fast tokenizer is wrong" in caplog.text and "tiktoken encodes this piece" in caplog.text
