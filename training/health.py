"""Is the model well? What tells of trouble before the loss does: norms, and each layer's extremes.

Growing attention logits and activations announce an instability many steps ahead (Wortsman et al. 2023,
arXiv 2309.14322). One sequence is enough to see them, so looking costs one forward pass of one sequence.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training import modern
from training.gpt2 import GPT2, Block
from training.models import Model
from training.optim import ShardedAdamW


@torch.no_grad()
def examine(model: Model, optimizer: ShardedAdamW, tokens: Tensor) -> dict[str, Any]:
    """tokens: (1, T) -> the norm of all parameters, and by layer the largest attention logit and the RMS behind it."""
    logits, sizes = [], []
    for largest, x in _gpt2_layers(model, tokens) if isinstance(model, GPT2) else _modern_layers(model, tokens):
        logits.append(largest)
        sizes.append(x.float().square().mean().sqrt())
    return {
        "parameter_norm": float(optimizer.parameter_norm()),
        "attention_logit_max": [round(float(v), 4) for v in logits],
        "activation_rms": [round(float(v), 4) for v in sizes],
    }


def _gpt2_layers(model: GPT2, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block's largest attention logit, and the stream behind it."""
    x = model.wte(tokens) + model.wpe.weight[: tokens.shape[1]]
    for block in model.blocks:
        assert isinstance(block, Block)
        qkv = block.attn.c_attn(block.ln_1(x))
        q, k, _ = qkv.view(*tokens.shape, 3, block.attn.heads, -1).unbind(2)
        x = block.forward(x)  # the module itself, compiled or fused as it may be elsewhere
        yield _largest_logit(q, k), x


def _modern_layers(model: modern.Modern, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    angles = modern.rotations(tokens.shape[1], model.config.head_size, tokens.device)
    x = modern.norm(model.wte(tokens))
    for block in model.blocks:
        assert isinstance(block, modern.Block)
        q, k, _ = block.attn.qkv(modern.norm(x), *angles)
        x = block.forward(x, *angles)
        yield _largest_logit(q, k), x


def _largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest scaled product of a query with an earlier key; q and k: (B, T, H, D)."""
    _, T, heads, size = q.shape
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    largest = [
        (q[:, :, h].float() @ k[:, :, h].float().transpose(1, 2)).masked_fill(future, -math.inf).amax()
        for h in range(heads)
    ]
    return torch.stack(largest).max() / math.sqrt(size)
