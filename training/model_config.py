"""Which model is it? Its sizes, what follows from them, and how "d48" becomes them."""

import re
from dataclasses import dataclass
from typing import Literal

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder: GPT-2 or GPT-3 shaped, or of the speed recipe's architecture."""

    layers: int  # blocks, one behind the other
    channels: int  # numbers that stand for a token between blocks
    heads: int  # of attention in each block; they divide the channels
    context: int = 1024  # -t: tokens a sequence, T; also the number of learned positions
    vocab: int = GPT2_VOCABULARY  # tokens that there are
    family: Literal["gpt2", "nanochat"] = "gpt2"  # nanochat: transformers' name of the speed recipe's architecture

    def __post_init__(self) -> None:
        if min(self.layers, self.channels, self.heads, self.context, self.vocab) < 1:
            raise ValueError(f"every size of a model must be at least 1, got {self}")
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} is not a multiple of heads={self.heads}")
        if self.family == "nanochat" and self.head_size % 2:
            raise ValueError(
                f"heads={self.heads} leaves {self.head_size} of {self.channels} channels to a head: rotary positions "
                "turn pairs of them, so their number must be even"
            )

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to a multiple of 128 (50304), so that the head's matmul tiles evenly."""
        return -(-self.vocab // 128) * 128

    @property
    def block_matrices(self) -> int:
        """Elements of all blocks' matrices: 84,934,656 for d12."""
        return 12 * self.layers * self.channels**2

    @property
    def parameters(self) -> int:
        """Trained parameters, padding rows left out: 124,439,808 for d12."""
        if self.family == "nanochat":  # matrices alone, and a head of its own
            return self.block_matrices + 2 * self.vocab * self.channels
        vectors = (13 * self.layers + 2) * self.channels
        return self.block_matrices + vectors + (self.vocab + self.context) * self.channels

    @property
    def padded_parameters(self) -> int:
        """With the padding rows of the embedding, and of the head where it has its own."""
        tables = 2 if self.family == "nanochat" else 1
        return self.parameters + tables * (self.padded_vocab - self.vocab) * self.channels

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, by llm.c's formula 6N + 6LCT with N over the padded vocabulary.

        An embedding that is not the head, too, is only looked up: it does not count.
        """
        looked_up = self.padded_vocab * self.channels if self.family == "nanochat" else 0
        return 6 * (self.padded_parameters - looked_up) + 6 * self.layers * self.channels * self.context


# llm.c's tables: GPT-2 by depth -> (channels, heads); GPT-3 by channels -> (layers, head size).
GPT2_BY_DEPTH = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30)}
GPT3_BY_CHANNELS = {
    384: (6, 64),
    768: (12, 64),
    1024: (24, 64),
    1536: (24, 96),
    2048: (24, 128),
    2560: (32, 80),
    4096: (32, 128),
}
# The speed recipe's by depth -> channels, where the rule would not give a GPT-2's class. 48 layers of 1536 channels are
# the nearest to 1558M (1,513M): 1600 channels are no multiple of the head size.
MODERN_BY_DEPTH = {24: 1024, 48: 1536}
MODERN_HEAD_SIZE = 128


def model_from_descriptor(text: str) -> ModelConfig:
    """Read llm.c's `-e`: "d48" is GPT-2 by depth, "gpt3:c1536" is GPT-3 by channels.

    "modern:d12" is the speed recipe's model by depth, "modern:d12c384" by depth and channels.
    """
    if match := re.fullmatch(r"d(\d+)", text):
        return _gpt2(int(match[1]))
    if match := re.fullmatch(r"gpt3:c(\d+)", text):
        return _gpt3(int(match[1]))
    if match := re.fullmatch(r"modern:d(\d+)(?:c(\d+))?", text):
        return _modern(int(match[1]), int(match[2] or 0))
    raise ValueError(
        f"unknown model {text!r}: write d12, d24, d36 or d48, gpt3:c768 … gpt3:c4096, or modern:d12, modern:d24 …"
    )


def _gpt2(depth: int) -> ModelConfig:
    if depth not in GPT2_BY_DEPTH:
        raise ValueError(f"no GPT-2 of depth {depth}: choose from {sorted(GPT2_BY_DEPTH)}")
    channels, heads = GPT2_BY_DEPTH[depth]
    return ModelConfig(layers=depth, channels=channels, heads=heads)


def _gpt3(channels: int) -> ModelConfig:
    if channels not in GPT3_BY_CHANNELS:
        raise ValueError(f"no GPT-3 of {channels} channels: choose from {sorted(GPT3_BY_CHANNELS)}")
    layers, head_size = GPT3_BY_CHANNELS[channels]
    return ModelConfig(layers=layers, channels=channels, heads=channels // head_size, context=2048)


def _modern(depth: int, channels: int) -> ModelConfig:
    """64 channels a layer, in whole heads, where the table says nothing else."""
    size = MODERN_HEAD_SIZE
    channels = channels or MODERN_BY_DEPTH.get(depth, -(-64 * depth // size) * size)
    if channels % size:
        raise ValueError(
            f"{channels} channels are not whole heads of {size}: write modern:d{depth}c{-(-channels // size) * size}"
        )
    return ModelConfig(layers=depth, channels=channels, heads=channels // size, family="nanochat")
