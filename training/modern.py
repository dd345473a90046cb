"""What is the speed recipe's model? Its parts, its initial weights, and the way from tokens to the loss.

A decoder in the architecture that transformers calls `nanochat`, so that an export needs no code of ours: rotary
positions, normalized queries and keys, RMSNorm without parameters (also behind the embedding), squared ReLU, a head of
its own whose logits are softly capped. No biases and no gains: every parameter is a matrix.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model_config import ModelConfig

ROPE_BASE = 10_000.0
CAP = 15.0  # logits lie between -CAP and CAP
EPS = 1e-6  # transformers' default for this architecture


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def rotations(length: int, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D / 2) fp32 of each position's angle in each pair of channels."""
    frequencies = ROPE_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D): each pair (x[i], x[i + D/2]) is turned by its position's angle, clockwise."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.channels, 3 * config.channels, bias=False)
        self.c_proj = nn.Linear(config.channels, config.channels, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x, cos, sin))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries, keys and values (B, T, H, D), the first two rotated and normalized."""
        q, k, v = self.c_attn(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        return norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.channels, 4 * config.channels, bias=False)
        self.c_proj = nn.Linear(4 * config.channels, config.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), cos, sin)
        return x + self.mlp(norm(x))  # type: ignore[no-any-return]


class Modern(nn.Module):
    """Called like GPT2, with the same names where the parts are the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.channels, config.padded_vocab, bias=False)
        self.runner: Callable[[Tensor, Tensor], Tensor] | None = None

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """From a CPU generator, the same on every rank and device.

        Matrices uniform with standard deviation 1 / sqrt(inputs); what writes to the residual stream and the head
        begin at zero, so that the model begins as the embedding with a uniform prediction. Embeddings N(0, 1):
        they are normalized.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("c_proj.weight", "head.weight")):
                weight.zero_()
            elif name == "wte.weight":
                weight.copy_(torch.empty(weight.shape).normal_(0.0, 1.0, generator=generator))
            else:
                bound = math.sqrt(3.0 / weight.shape[1])
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        self.wte.weight[self.config.vocab :] = 0.0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (B, T) int64 -> mean loss, an fp32 scalar."""
        if self.runner is not None:
            return self.runner(tokens, targets)
        logits = self.logits(tokens).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        return self.head_logits(self.hidden(tokens))

    def head_logits(self, x: Tensor) -> Tensor:
        """(…, C), after the last norm -> (…, V)."""
        return CAP * torch.tanh(F.linear(x, self.head.weight[: self.config.vocab]) / CAP)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C), after the last norm."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the model's context of {self.config.context}")
        cos, sin = rotations(tokens.shape[1], self.config.head_size, tokens.device)
        x = norm(self.wte(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        return norm(x)
