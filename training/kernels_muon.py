"""How do Muon's two passes over a block's matrices run in one sweep of memory each? What lies between is products.

`accumulate` reads the gradient and moves the momentum, `apply` moves the weights: 24 bytes a parameter together for
bf16 weights with fp32 masters.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _accumulate(gradients, momenta, updates, size, momentum, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gradient = tl.load(gradients + place, inside, 0.0).to(tl.float32) * scale
    mean = tl.load(momenta + place, inside, 0.0)
    mean += (gradient - mean) * (1.0 - momentum)
    tl.store(momenta + place, mean, inside)
    ahead = gradient + (mean - gradient) * momentum
    tl.store(updates + place, ahead.to(updates.dtype.element_ty), inside)


def accumulate(gradients: Tensor, momenta: Tensor, updates: Tensor, momentum: float, scale: float) -> None:
    """Move the fp32 `momenta` towards the gradients times `scale`; `updates` gets Nesterov's look ahead. All flat."""
    size = gradients.numel()
    _accumulate[(triton.cdiv(size, BLOCK),)](
        gradients, momenta, updates, size, momentum, scale, BLOCK=BLOCK, num_warps=8
    )


@triton.jit
def _apply(weights, masters, updates, size, lr, decay, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(masters + place, inside, 0.0)
    update = tl.load(updates + place, inside, 0.0).to(tl.float32)
    value -= lr * (update + tl.where(update * value > 0.0, decay * value, 0.0))
    tl.store(masters + place, value, inside)
    tl.store(weights + place, value.to(weights.dtype.element_ty), inside)


def apply(weights: Tensor, masters: Tensor, updates: Tensor, lr: float, decay: float) -> None:
    """Take the update off the fp32 masters, and their decay where it has the same sign; weights, which may be the
    masters, get these rounded."""
    size = weights.numel()
    _apply[(triton.cdiv(size, BLOCK),)](weights, masters, updates, size, lr, decay, BLOCK=BLOCK, num_warps=8)
