"""The batch tokenizer gives tiktoken's tokens for every character and every way that words can meet."""

import itertools
import random
import sys
import unicodedata

import numpy as np
import pytest

from storage import batch_tokenizer, tokenizer
from storage.batch_tokenizer import BatchTokenizer, Mismatch, encode_by_reference, encode_in_parts


def check(texts: list[str], batch: BatchTokenizer | None = None) -> None:
    documents = [text.encode() for text in texts]
    stream, lengths = (batch or BatchTokenizer()).encode(documents)
    expected = [[50256, *tokenizer.encoding().encode_ordinary(text)] for text in texts]
    assert stream.tolist() == [token for one in expected for token in one]
    assert lengths.tolist() == [len(one) for one in expected]


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "", ""],
        ["Hello world", "", "again"],
        ["it's they'll we've I'm he'd you're don't", "'s", "s'", "'", "''s", "'ll've", "'lx 'vx 'r"],
        [" 's x 's\n's\t'll\u00a0're 90's '90s rock'n'roll 'T 'S"],
        ["trailing   ", "   ", "\n\n\n", " \n x", "a  b   c\t\td \n\n e", "\u3000\u3000x\u2003 y \u00a0"],
        ["<|endoftext|>", "a<|endoftext|>b", "\0", "a\0\0b"],
        ["x" * 300_000, "1" * 10_000, " " * 10_000, "'" * 1_000],
        ["日本語 ①②③ Ⅷ ٣٤٥ naïve e\u0301 Ǆ ﬁ 🙂👍🏽 𝔘𝔫𝔦 𓀀 \U00020000 ½x"],
    ],
)
def test_named_cases(texts):
    check(texts)


def test_every_assigned_character_beside_letters_numbers_blanks_and_marks():
    assigned = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    batch = BatchTokenizer()
    for first in range(0, len(assigned), 4000):
        check([f"a{c}b {c} {c}1{c}{c} !{c}'s{c}  {c}" for c in assigned[first : first + 4000 : 7]], batch)
        check(["".join(assigned[first : first + 4000])], batch)


def test_every_short_string_of_the_patterns_characters():
    """All strings of length 5 over a letter, s, l, a digit, an apostrophe, a sign and three white spaces."""
    check(["".join(p) for p in itertools.product("xsl1'! \n\u00a0", repeat=5)])


def test_random_text_in_one_batch_after_the_other():
    choose = random.Random(11)
    alphabet = "abcdesdmtlvr'' \n\t0123.,!?éßжλ中あ🙂\u2019\u2028\u00a0"
    batch = BatchTokenizer()
    for _ in range(10):
        check(["".join(choose.choices(alphabet, k=choose.randrange(200))) for _ in range(100)], batch)


def test_forgetting_words_changes_nothing(monkeypatch):
    monkeypatch.setattr(batch_tokenizer, "MEMORY", 1_000)
    batch = BatchTokenizer()
    for number in range(5):
        check([f"word{number} common words and rare{number} ones"] * 3, batch)
        assert len(batch.numbers) < 40


def test_bytes_that_are_no_utf8_are_replaced_as_python_does():
    documents = [b"cut \xe2\x82", b"\x82\xac next", b"lone \xed\xa0\x80 surrogate", b"mark \xff inside"]
    stream, _ = BatchTokenizer().encode(documents)
    assert stream.tolist() == encode_by_reference(documents)[0].tolist()
    assert tokenizer.decode(stream[1:4]).startswith("cut")


def test_characters_that_python_does_not_know_go_to_tiktoken(monkeypatch):
    unassigned = next(c for c in map(chr, range(0x0870, 0x1FFFF)) if unicodedata.category(c) == "Cn")
    check([f"before {unassigned}{unassigned} after", "plain"])
    assert batch_tokenizer.word_starts(f"\xff {unassigned}".encode("latin-1", "ignore") + unassigned.encode()) is None


def test_a_wrong_word_is_noticed():
    batch = BatchTokenizer()
    batch.encode([b"right words"])
    batch.tokens[batch.starts[batch.numbers[b" words"]]] += 1
    with pytest.raises(Mismatch, match="right words"):
        batch.encode([b"right words"])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_document_in_parts_has_the_same_tokens(size: int) -> None:
    odd = [
        "a  b \n\n c's 'll \u3000 x\u00a0 y  ",
        "\u4f60\u597d\u3002\n\u3000 \u4e16\u754c \u754c  1 2",
        "",
        " ",
        "x" * 50,
        "\u2003 \u2003\n!",
    ]
    for text in [*odd, " ".join(odd), "\n".join(odd * 3)]:
        document = text.encode()
        whole, in_parts = encode_by_reference([document]), encode_in_parts(document, size, BatchTokenizer().encode)
        assert all(np.array_equal(one, other) for one, other in zip(whole, in_parts, strict=True))


def test_a_document_with_bytes_that_are_no_utf8_has_the_same_tokens_in_parts() -> None:
    document = b"a \xe4\xb8 b\xed\xa0\x81 c\xff \xe3\x80 d " * 5
    whole, in_parts = encode_by_reference([document]), encode_in_parts(document, 3, BatchTokenizer().encode)
    assert np.array_equal(whole[0], in_parts[0])
