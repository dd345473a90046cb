"""Which runs of words does a text hold, as numbers that are quick to compare?

Words are runs of letters and numbers, ASCII in lower case; whatever stands between them does not count. Each
word, and each run of n words (a shingle), has a hash of 64 bits, made for a whole batch of documents at once.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from storage.batch_tokenizer import NUMBER, character_classes, is_utf8

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse among the 64-bit numbers
STEP = 0xBF58476D1CE4E5B9
HASHED_TEXT = 2**20  # bytes whose words are hashed together; a longer word counts by its first so many
CUT = re.compile(rb"[^0-9A-Za-z\x80-\xff]")  # a document may be cut here: in no word and no wide character
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Words:
    """The words of a batch of documents, one after the other."""

    text: bytes  # in lower case
    starts: NDArray[np.int64]  # of each word in the text
    ends: NDArray[np.int64]
    documents: NDArray[np.int64]  # number of the document that each word is in
    hashes: Hashes

    def run(self, first: int, count: int) -> str:
        """Words as text, a blank between them."""
        spans = zip(self.starts[first : first + count], self.ends[first : first + count], strict=True)
        return b" ".join(self.text[a:b] for a, b in spans).decode()


def words_in_parts(documents: Sequence[bytes], size: int, length: int) -> Iterator[Words]:
    """The words of a batch; of a single document above `size` bytes part by part, so that memory stays bounded.

    Each part begins with the last `length` - 1 words of the one before: a run of `length` words lies in one part.
    """
    if len(documents) != 1 or len(documents[0]) <= size:
        yield words_of(documents)
        return
    document, first, before = documents[0], 0, b""
    while first < len(document):
        cut = CUT.search(document, first + size)
        stop = cut.start() if cut else len(document)
        words = words_of([before + document[first:stop]])
        yield words
        before = words.run(max(0, len(words.starts) - length + 1), length - 1).encode()
        first = stop


def words_of(documents: Sequence[bytes]) -> Words:
    if not is_utf8(b"\n".join(documents)):
        documents = [d.decode("utf-8", "replace").encode() for d in documents]
    text = b"".join([b"\xff" + d for d in documents]).lower()
    data = np.frombuffer(text, dtype=np.uint8)
    inside = character_classes(data).of_bytes <= NUMBER
    edges = np.flatnonzero(np.diff(inside.view(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    marks = np.flatnonzero(data == 0xFF)
    numbers = np.searchsorted(marks, starts) - 1
    return Words(text, starts, ends, numbers, _word_hashes(data, starts, ends))


def _word_hashes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
    """A polynomial in the word's bytes, from prefix sums over HASHED_TEXT at a time."""
    hashes = np.empty(len(starts), dtype=np.uint64)
    ends = np.minimum(ends, starts + HASHED_TEXT)
    powers, inverses = _powers()
    first = 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + HASHED_TEXT, side="right"))
        text = data[starts[first] : ends[last - 1]]
        sums = np.zeros(len(text) + 1, dtype=np.uint64)
        np.cumsum(text * powers[: len(text)], out=sums[1:])
        begins, stops = starts[first:last] - starts[first], ends[first:last] - starts[first]
        hashes[first:last] = _mixed((sums[stops] - sums[begins]) * inverses[begins])
        first = last
    return hashes


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """BASE to the power of 0, 1, …, and the inverses, modulo 2**64."""
    return _geometric(BASE), _geometric(pow(BASE, -1, 2**64))


def _geometric(ratio: int) -> Hashes:
    values = np.full(HASHED_TEXT, ratio, dtype=np.uint64)
    values[0] = 1
    return np.cumprod(values)


def _mixed(values: Hashes) -> Hashes:
    """Spread differences in any bit over all bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(STEP)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(words: Words, length: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all runs of `length` words that lie in one document, and the first word of each."""
    count = len(words.hashes) - length + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(words.documents[:count] == words.documents[length - 1 :])
    total = np.zeros(count, dtype=np.uint64)
    for k in range(length):
        total = total * np.uint64(STEP) + words.hashes[k : k + count]
    return _mixed(total)[first], first
