"""How are many documents encoded at once, faster than tiktoken does one by one, into the same tokens?

GPT-2's pattern splits text into words at places that the classes of neighbouring characters decide (letter,
number, white space, other), and byte pair encoding never crosses them. So a batch of documents is one array
of bytes: numpy marks the starts of words, Arrow's hash table numbers the distinct words, tiktoken encodes
those that were not met before, and the stream is gathered from their tokens. English repeats its words.

tiktoken is the reference: it encodes some documents of each batch as well, and a batch with characters that
this Python's Unicode tables do not know, or with bytes that are no UTF-8, goes to it whole.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import tokenizer
from storage.tokenizer import EOT, Tokens

LETTER, NUMBER, OTHER, SPACE, MARK, UNKNOWN = range(6)  # classes of characters
MARK_BYTE = 0xFF  # stands before each document; no UTF-8 text has this byte
WHITE_SPACE = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]
WHITE_SPACE += [0x2028, 0x2029, 0x202F, 0x205F, 0x3000]  # Unicode's White_Space: the pattern's \s
MEMORY = 64 * 2**20  # bytes of words remembered at once; when they are full, the memory starts anew
WORD_OVERHEAD = 120  # bytes that Python and numpy take for a word beside its own
CHECKED = 4  # documents of each batch that tiktoken encodes too,
CHECKED_TEXT = 64 * 2**10  # about so many bytes of each

# Blanks after a visible character, ASCII or one of three bytes: there a word always ends, whatever follows
CUT = re.compile(rb"(?:(?<=[!-~])|(?<=[\xe3-\xef][\x80-\xbf][\x81-\xbf]))[ \n]")

Lengths = NDArray[np.int64]
Encode = Callable[[Sequence[bytes]], tuple[Tokens, Lengths]]


class Mismatch(Exception):
    """This encoder and tiktoken disagree on a text, so only tiktoken's tokens may be used."""


@cache
def batch_tokenizer() -> "BatchTokenizer":
    """This process's own, with all that it has learned."""
    return BatchTokenizer()


def encode_by_reference(documents: Sequence[bytes]) -> tuple[Tokens, Lengths]:
    """Documents as one stream, EOT before each, and the length of each with its EOT: by tiktoken alone."""
    encoded = [tokenizer.encode(document.decode("utf-8", "replace")) for document in documents]
    eot = np.array([EOT], dtype=np.uint16)
    stream = np.concatenate([eot[:0], *(part for tokens in encoded for part in (eot, tokens))])
    return stream, np.array([1 + len(tokens) for tokens in encoded], dtype=np.int64)


def encode_in_parts(document: bytes, size: int, encode: Encode) -> tuple[Tokens, Lengths]:
    """What `encode` gives for one document, in memory for about `size` bytes of it at a time."""
    streams = [encode([part])[0] for part in _parts(document, size)]
    stream = np.concatenate([streams[0], *(tokens[1:] for tokens in streams[1:])])  # EOT stands before the first alone
    return stream, np.array([len(stream)], dtype=np.int64)


def _parts(document: bytes, size: int) -> Iterator[bytes]:
    first = 0
    while cut := CUT.search(document, first + size):
        yield document[first : cut.start()]
        first = cut.start()
    yield document[first:]


class BatchTokenizer:
    """Encodes batches of documents. It remembers the words it has met: keep one for many batches."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.numbers = {bytes([MARK_BYTE]): 0}  # of each known word; a document's mark is a word, EOT
        self.tokens = np.array([EOT], dtype=np.uint16)  # of all known words, one after the other
        self.starts = np.zeros(1, dtype=np.int32)
        self.lengths = np.ones(1, dtype=np.int32)
        self.memory = 0

    def encode(self, documents: Sequence[bytes]) -> tuple[Tokens, Lengths]:
        """What `encode_by_reference` gives. Raises Mismatch where a document shows that it does not."""
        text = b"".join([b"\xff" + document for document in documents])
        starts = word_starts(text) if documents and is_utf8(b"\n".join(documents)) else None
        if starts is None:
            return encode_by_reference(documents)
        stream, lengths = self._gather(self._words(text, starts))
        for document, start in zip(documents[:CHECKED], np.cumsum(lengths) - lengths, strict=False):
            expected, _ = encode_by_reference([next(_parts(document, CHECKED_TEXT))])
            if not np.array_equal(stream[start : start + len(expected)], expected):
                raise Mismatch(f"the document that begins with {document[:80]!r}")
        return stream, lengths

    def _words(self, text: bytes, starts: NDArray[np.int32]) -> NDArray[np.int32]:
        """The number of each word of the text."""
        bounds = np.append(starts, np.int32(len(text)))
        buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
        found = pa.Array.from_buffers(pa.binary(), len(starts), buffers).dictionary_encode()
        numbers = self._number(found.dictionary.to_pylist())
        return numbers[found.indices.to_numpy()]

    def _number(self, words: list[bytes]) -> NDArray[np.int32]:
        if self.memory > MEMORY:
            self._forget()
        numbers = np.fromiter(map(self.numbers.get, words, repeat(-1)), dtype=np.int32, count=len(words))
        missing = np.flatnonzero(numbers < 0)
        new = [words[i] for i in missing.tolist()]
        visible = [word for word in new if not word.decode().isspace()]
        self._remember(visible, _encode_visible)
        if len(visible) < len(new):
            self._remember([word for word in new if word.decode().isspace()], _encode_each)
        numbers[missing] = list(map(self.numbers.__getitem__, new))
        return numbers

    def _remember(self, words: list[bytes], encode: Callable[[list[str]], tuple[Tokens, NDArray[np.int32]]]) -> None:
        if not words:
            return
        first = len(self.numbers)
        self.numbers.update(zip(words, range(first, first + len(words)), strict=True))
        self.memory += sum(map(len, words)) + WORD_OVERHEAD * len(words)
        tokens, lengths = encode([word.decode() for word in words])
        starts = len(self.tokens) + np.cumsum(lengths, dtype=np.int32) - lengths
        self.starts = np.append(self.starts, starts)
        self.lengths = np.append(self.lengths, lengths)
        self.tokens = np.append(self.tokens, tokens)

    def _gather(self, words: NDArray[np.int32]) -> tuple[Tokens, Lengths]:
        """The tokens of a run of words, and how many lie from each document's mark to the next."""
        lengths = self.lengths[words]
        ends = np.cumsum(lengths, dtype=np.int32)
        total = int(ends[-1])
        places = np.arange(total, dtype=np.int32) + np.repeat(self.starts[words] - ends + lengths, lengths)
        marks = (ends - lengths)[words == 0]
        return self.tokens[places], np.diff(np.append(marks, total)).astype(np.int64)


def _encode_each(words: list[str]) -> tuple[Tokens, NDArray[np.int32]]:
    """The tokens of words, one after the other, and how many each has."""
    encoded = [tokenizer.encode(word) for word in words]
    return np.concatenate(encoded), np.array(list(map(len, encoded)), dtype=np.int32)


def _encode_visible(words: list[str]) -> tuple[Tokens, NDArray[np.int32]]:
    """The same in one call, for words that are not blank: a line each, since no word runs over a line's end."""
    tokens = tokenizer.encode_long("\n".join(words))
    line_end = tokenizer.encode("\n")[0]
    ends = np.flatnonzero(np.append(tokens, line_end) == line_end)
    return tokens[tokens != line_end], (np.diff(ends, prepend=-1) - 1).astype(np.int32)


@dataclass(frozen=True)
class Classes:
    """The classes of the characters of a text, byte by byte: each byte has its character's."""

    of_bytes: NDArray[np.uint8]
    wide: NDArray[np.int64]  # first bytes of the characters of several bytes
    sizes: NDArray[np.int64]  # how many bytes each of these has
    of_wide: NDArray[np.uint8]


def character_classes(data: NDArray[np.uint8]) -> Classes:
    """`data` is UTF-8 with marks between documents."""
    classes = _byte_classes()[data]
    wide = np.flatnonzero((data >= 0xC0) & (data != MARK_BYTE))
    sizes = 2 + (data[wide] >= 0xE0).astype(np.int64) + (data[wide] >= 0xF0)
    of_wide = _classes(_code_points(data, wide))
    for k in range(4):
        inside = sizes > k
        classes[wide[inside] + k] = of_wide[inside]
    return Classes(classes, wide, sizes, of_wide)


def word_starts(text: bytes) -> NDArray[np.int32] | None:
    """Where the words of marked documents start, in bytes; None where only tiktoken can tell."""
    data = np.frombuffer(text, dtype=np.uint8)
    classes = character_classes(data)
    if (classes.of_wide == UNKNOWN).any():
        return None
    starts = _starts(data, classes.of_bytes)
    blank = classes.of_wide == SPACE
    _move_to_first_byte(starts, classes.wide[blank], classes.sizes[blank])
    return np.flatnonzero(starts).astype(np.int32)


def _move_to_first_byte(starts: NDArray[np.bool_], at: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    """A word that starts at the last byte of a white space of several bytes starts at its first."""
    last = at + sizes - 1
    split = starts[last]
    starts[last[split]] = False
    starts[at[split]] = True


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _starts(data: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether a word starts at each byte, given its class, which is its character's.

    The pattern, in its order: contractions; a run of letters, of numbers, or of others, each with one blank
    before it; white space, less the last of a run that something follows.
    """
    starts = np.ones(len(data), dtype=bool)
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])
    starts |= classes == MARK
    visible = classes < SPACE
    starts[:-1] |= (classes[:-1] == SPACE) & visible[1:]
    starts[1:] &= ~((data[:-1] == ord(" ")) & visible[1:])
    _mark_contractions(starts, data, classes)
    return starts


def _mark_contractions(starts: NDArray[np.bool_], data: NDArray[np.uint8], classes: NDArray[np.uint8]) -> None:
    """'s 'd 'm 't 'll 've 're are words, unless a blank or a run of others has taken their apostrophe."""
    padded = np.append(data, np.zeros(3, np.uint8))
    at = np.flatnonzero(data == ord("'"))
    at = at[(classes[at - 1] != OTHER) & (data[at - 1] != ord(" "))]
    second, third = padded[at + 1], padded[at + 2]
    short = at[np.isin(second, list(b"sdmt"))]
    pairs = [(second == a) & (third == b) for a, b in (b"ll", b"ve", b"re")]
    long = at[pairs[0] | pairs[1] | pairs[2]]
    starts[np.concatenate([short + 1, long + 1, long + 2])] = False
    ends = np.concatenate([short + 2, long + 3])
    starts[ends[ends < len(starts)]] = True


def _code_points(data: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.int32]:
    """The code points of the characters of two to four bytes that start at `at`."""
    padded = np.append(data, np.zeros(3, np.uint8))
    byte = [padded[at + k].astype(np.int32) for k in range(4)]
    tail = [b & 0x3F for b in byte]
    two = (byte[0] & 0x1F) << 6 | tail[1]
    three = (byte[0] & 0x0F) << 12 | tail[1] << 6 | tail[2]
    four = (byte[0] & 0x07) << 18 | tail[1] << 12 | tail[2] << 6 | tail[3]
    return np.where(byte[0] < 0xE0, two, np.where(byte[0] < 0xF0, three, four))


def _classes(code_points: NDArray[np.int32]) -> NDArray[np.uint8]:
    distinct, places = np.unique(code_points, return_inverse=True)
    return np.array([_class(chr(c)) for c in distinct.tolist()], dtype=np.uint8)[places]


@cache
def _byte_classes() -> NDArray[np.uint8]:
    """The class of each byte below 0x80 and of a mark; bytes of longer characters get their character's."""
    classes = np.array([_class(chr(c)) for c in range(0x80)] + [OTHER] * 0x80, dtype=np.uint8)
    classes[MARK_BYTE] = MARK
    return classes


def _class(character: str) -> int:
    if ord(character) in WHITE_SPACE:
        return SPACE
    category = unicodedata.category(character)
    return UNKNOWN if category == "Cn" else {"L": LETTER, "N": NUMBER}.get(category[0], OTHER)
