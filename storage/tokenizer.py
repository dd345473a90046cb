"""What turns text into GPT-2's token ids and back?

Byte pair encoding as OpenAI published it, run by tiktoken over the vocabulary files that lie beside this
module, so that nothing is fetched at run time. Documents are encoded as plain text: the special token never
comes from characters in a document, only from the code that puts EOT before each one.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray

VOCABULARY = Path(__file__).parent / "vocabulary"
VOCABULARY_SHA256 = {  # the digests that tiktoken's own `gpt2` definition expects
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
VOCABULARY_SIZE = 50257
EOT = 50256
EOT_TEXT = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

Tokens = NDArray[np.uint16]


@cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's encoding. Raises ValueError when a vocabulary file is not the published one."""
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCABULARY_SIZE,
        pat_str=PATTERN,
        mergeable_ranks=merge_ranks(),
        special_tokens={EOT_TEXT: EOT},
    )


def merge_ranks() -> dict[bytes, int]:
    """Bytes of each ordinary token to its id, which is also its merge priority."""
    for name in VOCABULARY_SHA256:
        check_vocabulary_file(VOCABULARY / name)
    names = json.loads((VOCABULARY / "encoder.json").read_bytes())
    byte_of = _printable_bytes()
    return {bytes(byte_of[c] for c in name): rank for name, rank in names.items() if name != EOT_TEXT}


def check_vocabulary_file(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != VOCABULARY_SHA256[path.name]:
        raise ValueError(
            f"{path} has sha256 {digest}, not {VOCABULARY_SHA256[path.name]}: it is not GPT-2's vocabulary; "
            f"restore it with `git checkout -- storage/vocabulary`"
        )


def _printable_bytes() -> dict[str, int]:
    """The characters that stand for bytes in OpenAI's files: themselves if printable, else U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def encode(text: str) -> Tokens:
    """Token ids of `text`; `<|endoftext|>` in it is text, a lone surrogate becomes U+FFFD, as in tiktoken."""
    return np.array(encoding().encode_ordinary(text), dtype=np.uint16)


def encode_long(text: str) -> Tokens:
    """The same for a long text without lone surrogates, faster: no list of Python numbers is made."""
    return encoding().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def decode(tokens: Tokens) -> str:
    """The text of `tokens`; bytes that are no UTF-8 (a character cut by the ends) become U+FFFD."""
    return encoding().decode(tokens.tolist())
