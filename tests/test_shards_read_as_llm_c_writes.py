"""Token shards and item files keep llm.c's formats; what is broken is refused with the fix."""

import struct

import numpy as np
import pytest

from storage import shards, tokenizer


def llm_c_shard(tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A shard packed by hand from the format's description."""
    head = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return head + struct.pack(f"<{len(tokens)}H", *tokens)


def test_a_written_shard_has_llm_cs_bytes(tmp_path):
    tokens = [50256, 15496, 995, 0, 50255]
    path = str(tmp_path / "c_val_000000.bin")
    shards.write_shard(path, np.array(tokens, dtype=np.uint16))
    assert (tmp_path / "c_val_000000.bin").read_bytes() == llm_c_shard(tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["c_val_000000.bin"]


def test_a_shard_of_llm_c_is_read(tmp_path):
    path = tmp_path / "edu_fineweb_train_000001.bin"
    path.write_bytes(llm_c_shard([1, 2, 3]))
    assert shards.read_header(str(path)) == 3
    assert shards.open_shard(str(path)).tolist() == [1, 2, 3]


def test_an_empty_shard_is_a_shard(tmp_path):
    path = str(tmp_path / "c_train_000001.bin")
    shards.write_shard(path, np.zeros(0, dtype=np.uint16))
    assert shards.read_header(path) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is broken: 0 bytes are no token shard"),
        (llm_c_shard([1, 2], magic=20240522), "its magic is 20240522, not 20240520"),
        (llm_c_shard([1, 2], version=7), "has version 7"),
        (llm_c_shard([1, 2], count=3), "its header says 3 tokens .* but it has 1,028 bytes; remove it"),
        (llm_c_shard([1, 2])[:-1], "but it has 1,027 bytes"),
    ],
)
def test_a_broken_shard_is_refused_with_its_name_and_the_fix(tmp_path, content, message):
    path = tmp_path / "broken_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        shards.read_header(str(path))
    assert str(path) in str(error.value)


def test_a_token_outside_the_vocabulary_is_found(tmp_path):
    path = str(tmp_path / "c_train_000001.bin")
    shards.write_shard(path, np.array([1, 50257], dtype=np.uint16))
    with pytest.raises(ValueError, match="holds token 50257"):
        shards.check_tokens(path)


@pytest.mark.parametrize("corpus", ["c", "my_train_and_val_set"])
def test_splits_are_listed_in_corpus_order(tmp_path, corpus):
    for index in (10, 2, 1, 0):
        name = shards.shard_name(corpus, shards.split_of(index), index)
        shards.write_shard(str(tmp_path / name), np.zeros(1, dtype=np.uint16))
    expected = [str(tmp_path / f"{corpus}_train_{index:06d}.bin") for index in (1, 2, 10)]
    assert shards.shard_paths(str(tmp_path), "train") == expected
    assert shards.shard_paths(str(tmp_path), "val") == [str(tmp_path / f"{corpus}_val_000000.bin")]


def test_shards_live_on_s3_too(s3_store):
    url = f"{s3_store}/shards/c_val_000000.bin"
    shards.write_shard(url, np.array([5, 6], dtype=np.uint16))
    assert shards.read_header(url) == 2
    assert shards.shard_paths(f"{s3_store}/shards", "val") == [url]


def _choice() -> shards.Choice:
    context, endings = tokenizer.encode("A man sits"), [tokenizer.encode(f" {word}") for word in "abcd"]
    return shards.Choice(tuple(context.tolist()), tuple(tuple(e.tolist()) for e in endings), 2)


def test_items_have_llm_cs_layout(tmp_path):
    item = _choice()
    path = tmp_path / "items.bin"
    shards.write_choices(str(path), [item, item])
    data = path.read_bytes()
    values = struct.unpack(f"<{(len(data) - 1024) // 2}H", data[1024:])
    size = 5 + 1 + len(item.context) + 4 + sum(map(len, item.endings))
    assert struct.unpack("<4i", data[:16]) == (20240522, 1, 2, 2 * size)
    assert values[:6] == (65535, 2 * size, 0, 2, 4, len(item.context))
    assert values[size : size + 3] == (65535, 2 * size, 1)
    assert shards.read_choices(str(path)) == [item, item]


def test_a_broken_item_file_is_refused(tmp_path):
    path = tmp_path / "items.bin"
    shards.write_choices(str(path), [_choice(), _choice()])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is broken at value"):
        shards.read_choices(str(path))
    with pytest.raises(ValueError, match="3 endings, not 4"):
        shards.write_choices(str(path), [shards.Choice((1,), ((1,), (2,), (3,)), 0)])
