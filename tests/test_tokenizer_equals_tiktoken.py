"""Our offline GPT-2 encoding is tiktoken's own, token for token, in both directions."""

import random
import shutil

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from storage import tokenizer

SAMPLES = [
    "",
    "Hello, I'm a language model,",
    "  leading and trailing  \n\n\t spaces \r\n",
    "don't we've you'll I'M 12345 3.14159 naïve façade Übergröße",
    "日本語とＦｕｌｌｗｉｄｔｈ, عربى, עברית, हिन्दी, 🙂👩‍👩‍👧‍👦",
    "a\0b\0\0c",
    "<|endoftext|> is text here <|endoftext|>",
    "a" * 1_000_000,
    " " * 5_000,
    "^" * 20_000,
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """tiktoken's encoding from OpenAI's two files, read by tiktoken's own loader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(tokenizer.VOCABULARY / "vocab.bpe"),
            encoder_json_file=str(tokenizer.VOCABULARY / "encoder.json"),
        )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_encodes_as_tiktoken_does_and_decodes_back(reference, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == reference.encode_ordinary(text) == tokenizer.encode_long(text).tolist()
    assert tokenizer.decode(tokens) == text


def test_random_unicode_round_trips(reference):
    choose = random.Random(7)
    for _ in range(50):
        text = "".join(chr(choose.choice([choose.randrange(0xD800), choose.randrange(32, 127)])) for _ in range(400))
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(reference):
    text = "before \ud800 after"
    assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "before \ufffd after"


def test_text_never_becomes_the_special_token():
    assert tokenizer.EOT not in tokenizer.encode("x<|endoftext|>y")


def test_vocabulary_has_the_digests_that_tiktoken_pins(monkeypatch):
    pinned = {}

    def note(**arguments):
        pinned["vocab.bpe"] = arguments["vocab_bpe_hash"]
        pinned["encoder.json"] = arguments["encoder_json_hash"]
        return {}

    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", note)
    openai_public.gpt2()
    assert pinned == tokenizer.VOCABULARY_SHA256


def test_a_damaged_vocabulary_file_is_refused(tmp_path):
    damaged = tmp_path / "vocab.bpe"
    shutil.copyfile(tokenizer.VOCABULARY / "vocab.bpe", damaged)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"vocab.bpe has sha256 .* it is not GPT-2's vocabulary"):
        tokenizer.check_vocabulary_file(damaged)
