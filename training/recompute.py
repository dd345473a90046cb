"""What is computed again in the backward pass, so that it need not be kept? llm.c's levels, from outside.

1: GELU; 2: LayerNorm, too; 3: whole blocks. For the plain modules of `gpt2.py`: the fused model has its own.
Every level gives the same gradients: what is computed again is computed by the same operations.
"""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.attention import attend
from training.gpt2 import GPT2, Block


def apply(model: GPT2, level: int) -> None:
    """Have the model's blocks keep less; level 0 changes nothing."""
    for block in model.blocks:
        assert isinstance(block, Block)
        if level == 3:
            block.forward = functools.partial(_again, block.forward)  # type: ignore[method-assign]
        elif level > 0:
            block.forward = functools.partial(_forward, block, level)  # type: ignore[method-assign]


def _forward(block: Block, level: int, x: Tensor) -> Tensor:
    """`Block.forward` with the outputs of GELU, and at level 2 of LayerNorm, computed again."""
    normed = _again if level == 2 else _once
    qkv = normed(lambda x: block.attn.c_attn(block.ln_1(x)), x)
    x = x + block.attn.c_proj(attend(qkv, block.attn.heads))
    h = normed(lambda x: block.mlp.c_fc(block.ln_2(x)), x)
    return x + _again(lambda h: block.mlp.c_proj(F.gelu(h, approximate="tanh")), h)


def _once(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(x)


def _again(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`part(x)`, of which only `x` is kept for the backward pass; no random numbers are drawn in a block."""
    return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
