"""What does a file of tokens, or of multiple-choice items, look like on disk?

llm.c's formats: a header of 256 int32 (magic, version, counts), then uint16 values, so that its readers
take our files and ours take its. Shard 0 of a corpus is its validation split, all others are training.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np

from storage import objects
from storage.tokenizer import VOCABULARY_SIZE, Tokens

MAGIC = 20240520
CHOICES_MAGIC = 20240522
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
BLOCK_BYTES = 8 * 2**20  # read at once
ITEM_START = 65535  # no token has this id, so a reader that lost its place notices
CHOICES = 4
INDEX = ".documents.parquet"  # ends the name of a shard's index
PLAN = "plan.json"  # what a folder of shards is being made from
COMPLETE = "complete.json"  # that it is: all counts and files

Split = Literal["train", "val"]


def shard_name(corpus: str, split: Split, index: int) -> str:
    return f"{corpus}_{split}_{index:06d}.bin"


def index_name(shard: str) -> str:
    """The name, or the location, of the index of documents that lies beside a shard."""
    return shard.removesuffix(".bin") + INDEX


def split_of(index: int) -> Split:
    return "val" if index == 0 else "train"


def is_of(shard: str, split: Split) -> bool:
    """Whether a shard is one of a split, by the end of its name: a corpus may be called after another split."""
    return re.search(rf"_{split}_[^_]*\.bin$", shard) is not None


def shard_paths(folder: str, split: Split) -> list[str]:
    """The shards of one split in corpus order."""
    names = [s.path for s in objects.list_files(folder, ".bin") if is_of(s.path, split)]
    return [objects.join(folder, name) for name in names]


def header(magic: int, *counts: int) -> bytes:
    values = np.zeros(HEADER_INTS, dtype="<i4")
    values[: 2 + len(counts)] = [magic, VERSION, *counts]
    return values.tobytes()


def write_shard(url: str, tokens: Tokens) -> None:
    """Publish `tokens` (N,) as one shard."""
    with tempfile.TemporaryDirectory() as scratch:
        local = os.path.join(scratch, objects.name_of(url))
        with open(local, "wb") as f:
            f.write(header(MAGIC, len(tokens)))
            np.ascontiguousarray(tokens, dtype="<u2").tofile(f)
        objects.publish_file(local, url)


def read_header(path: str) -> int:
    """Number of tokens in a shard. Raises ValueError where the file is not a whole shard."""
    with objects.open_file(path) as f:
        values = _read_header(f, path, MAGIC, "token shard")
    count, size = int(values[2]), objects.stat(path).bytes
    if size != HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{path} is broken: its header says {count:,} tokens ({HEADER_BYTES + 2 * count:,} bytes) but it "
            f"has {size:,} bytes; remove it and run the same command again to make it anew"
        )
    return count


def _read_header(f: IO[bytes], path: str, magic: int, what: str) -> np.ndarray:
    head = f.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{path} is broken: {len(head)} bytes are no {what}; remove it and make it anew")
    values = np.frombuffer(head, dtype="<i4")
    if values[0] != magic:
        raise ValueError(f"{path} is no {what}: its magic is {values[0]}, not {magic}; is it another kind of file?")
    if values[1] != VERSION:
        raise ValueError(f"{path} has version {values[1]} of the {what} format; this program reads {VERSION}")
    return values


def open_shard(path: str) -> np.memmap:
    """Tokens of a local shard, mapped read-only: uint16 (N,)."""
    count = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_tokens(path: str) -> int:
    """The largest token id in a shard. Raises ValueError where one is outside GPT-2's vocabulary."""
    largest = max((int(block.max()) for block in _blocks(path)), default=0)
    if largest >= VOCABULARY_SIZE:
        raise ValueError(
            f"{path} holds token {largest}, but GPT-2's largest is {VOCABULARY_SIZE - 1}: the file is "
            f"damaged or comes from another tokenizer; remove it and make it anew"
        )
    return largest


def _blocks(path: str) -> Iterator[np.ndarray]:
    with objects.open_file(path) as f:
        f.seek(HEADER_BYTES)
        while data := f.read(BLOCK_BYTES):
            yield np.frombuffer(data, dtype="<u2")


def read_tokens(path: str, first: int, count: int) -> np.ndarray:
    """`count` tokens of a shard from `first` on, or as many as it has; on S3 only these bytes travel."""
    with objects.open_file(path) as f:
        f.seek(HEADER_BYTES + 2 * first)
        return np.frombuffer(f.read(2 * count), dtype="<u2")


@dataclass(frozen=True)
class Choice:
    """One multiple-choice item as tokens: a context and four endings, of which `label` is right."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int


def write_choices(path: str, items: Sequence[Choice]) -> None:
    """Publish items in llm.c's evaluation format; the endings carry the space that starts them."""
    encoded = [_encode_item(index, item) for index, item in enumerate(items)]
    longest = max((e.nbytes for e in encoded), default=0)
    data = header(CHOICES_MAGIC, len(encoded), longest) + b"".join(e.tobytes() for e in encoded)
    objects.publish_bytes(path, data)


def _encode_item(index: int, item: Choice) -> np.ndarray:
    if len(item.endings) != CHOICES:
        raise ValueError(f"item {index} has {len(item.endings)} endings, not {CHOICES}")
    body = [len(item.context), *item.context]
    for ending in item.endings:
        body += [len(ending), *ending]
    values = [ITEM_START, 0, index, item.label, CHOICES, *body]
    values[1] = 2 * len(values)
    return np.array(values, dtype="<u2")


def read_choices(path: str) -> list[Choice]:
    """Items written by `write_choices` or by llm.c. Raises ValueError where the file is damaged."""
    with objects.open_file(path) as f:
        count = int(_read_header(f, path, CHOICES_MAGIC, "file of multiple-choice items")[2])
        values = np.frombuffer(f.read(), dtype="<u2").tolist()
    items, at = [], 0
    for _ in range(count):
        size = values[at + 1] // 2 if at + 5 <= len(values) else 0
        if not size or at + size > len(values) or values[at] != ITEM_START or values[at + 4] != CHOICES:
            raise ValueError(f"{path} is broken at value {at}: no whole item there; remove it, make it anew")
        items.append(_decode_item(values[at : at + size]))
        at += size
    return items


def _decode_item(values: list[int]) -> Choice:
    lists, at = [], 5
    for _ in range(1 + CHOICES):
        length = values[at]
        lists.append(tuple(values[at + 1 : at + 1 + length]))
        at += 1 + length
    return Choice(lists[0], tuple(lists[1:]), values[3])
