"""Is the model well? What tells of trouble before the loss does: norms, and each layer's extremes.

Growing attention logits and activations announce an instability many steps ahead (Wortsman et al. 2023,
arXiv 2309.14322). One sequence is enough to see them, so looking costs one forward pass of one sequence.
"""

import math
from typing import Any

import torch
from torch import Tensor

from training.gpt2 import GPT2, Block
from training.optim import ShardedAdamW


@torch.no_grad()
def examine(model: GPT2, optimizer: ShardedAdamW, tokens: Tensor) -> dict[str, Any]:
    """tokens: (1, T) -> the norm of all parameters, and by layer the largest attention logit and the RMS behind it."""
    x = model.wte(tokens) + model.wpe.weight[: tokens.shape[1]]
    logits, sizes = [], []
    for block in model.blocks:
        assert isinstance(block, Block)
        logits.append(_largest_logit(block, x))
        x = block.forward(x)  # the module itself, compiled or fused as it may be elsewhere
        sizes.append(x.float().square().mean().sqrt())
    return {
        "parameter_norm": float(optimizer.parameter_norm()),
        "attention_logit_max": [round(float(v), 4) for v in logits],
        "activation_rms": [round(float(v), 4) for v in sizes],
    }


def _largest_logit(block: Block, x: Tensor) -> Tensor:
    """The largest scaled product of a query with an earlier key."""
    B, T, C = x.shape
    heads = block.attn.heads
    q, k, _ = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    largest = [
        (q[:, h].float() @ k[:, h].float().transpose(1, 2)).masked_fill(future, -math.inf).amax() for h in range(heads)
    ]
    return torch.stack(largest).max() / math.sqrt(C // heads)
