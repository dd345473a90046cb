"""What is GPT-2? Its parts, its initial weights, and the way from tokens to the loss.

GPT-2's architecture as published (pre-norm, learned positions, tanh GELU, tied head), and the GPT-3
family's: they differ in sizes only. Names and layout of the weights are ours; `export.py` maps them to Hugging Face's.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import attend
from training.kernels_head import head_loss
from training.model_config import ModelConfig

INIT_STD = 0.02


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.channels, 3 * config.channels)
        self.c_proj = nn.Linear(config.channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(self.c_attn(x), self.heads))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.channels, 4 * config.channels)
        self.c_proj = nn.Linear(4 * config.channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.channels, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.channels, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """A decoder whose head shares the token embedding's weights, padded to a multiple of 128 rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab, config.channels)
        self.wpe = nn.Embedding(config.context, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.channels, eps=1e-5)
        self.runner: Callable[[Tensor, Tensor], Tensor] | None = None  # a faster way to the same loss

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw GPT-2's initial weights from a CPU generator: the same on every rank and device.

        All matrices N(0, 0.02), residual projections / sqrt(2L), biases 0, LayerNorm 1 and 0; the padding
        rows of the embedding are 0.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
        self.wte.weight[self.config.vocab :] = 0.0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (B, T) int64 -> mean loss, an fp32 scalar. The logits are never held in full."""
        if self.runner is not None:
            return self.runner(tokens, targets)
        x = self.hidden(tokens)  # (B, T, C)
        return head_loss(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), for sampling and evals."""
        return self.head_logits(self.hidden(tokens))

    def head_logits(self, x: Tensor) -> Tensor:
        """(…, C), after the last LayerNorm -> (…, V)."""
        return x @ self.wte.weight[: self.config.vocab].t()

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C), after the last LayerNorm."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the model's context of {self.config.context}")
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)  # type: ignore[no-any-return]
