"""How do a chunk's logits become its losses and their own gradient, in place? One program a row, one pass over it.

The gradient of a row is its exponentials over their sum, less one at the target. The sum is known only at the end of
the row, so the row is left as exponentials, and `factors` says what they are still to be multiplied by. The products
that follow sum over the row or over the tokens: either way the factor can wait for the narrow side.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _cross_entropy(
    logits, targets, losses, factors, vocab, columns, scale, cap, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
    CAPPED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * columns
    target = tl.load(targets + row)
    # The target's own logit serves as the peak, which spares the search for the highest one.
    peak, top, slope = tl.load(base + target).to(tl.float32), 0.0, 1.0
    if CAPPED:
        share = _tanh(peak / cap, FAST)  # another name than in the loop: Triton gives each one type
        peak, slope = cap * share, 1.0 - share * share
    tl.debug_barrier()  # every warp has read it before any overwrites it
    lanes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(base + column, column < vocab, float("-inf")).to(tl.float32)
        if CAPPED:
            part = _tanh(value * (1.0 / cap), FAST)
            left = tl.where(column < vocab, tl.exp2((cap * part - peak) * LOG2E), 0.0)
            lanes += left
            left *= 1.0 - part * part
        else:
            above = value - peak
            far = above > 85.0
            power = tl.exp(above)
            lanes += tl.where(far, float("inf"), power)
            left = tl.where(far, -above, power)  # the exponent itself where the power is too large a number
        if GRADIENT:
            tl.store(base + column, left.to(logits.dtype.element_ty), column < columns)
    total = tl.sum(lanes, 0)
    # Rare: another logit is so far above the target's that the row needs its true peak. The exponents are then known
    # to the precision of the logits' type.
    if total > 1e38:
        lanes = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            lanes = tl.maximum(lanes, _above(base, column, column < vocab, peak, GRADIENT))
        top = tl.max(lanes, 0)
        lanes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            power = tl.exp(_above(base, column, column < vocab, peak, GRADIENT) - top)
            lanes += power
            if GRADIENT:
                tl.store(base + column, power.to(logits.dtype.element_ty), column < columns)
        total = tl.sum(lanes, 0)
    tl.store(losses + row, tl.log(total) + top)
    if GRADIENT:
        tl.store(base + target, ((tl.exp(0.0 - top) - total) * slope).to(logits.dtype.element_ty))
        tl.store(factors + row, scale / total)


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """Fast is the card's own: one operation, with an error of 2^-11, a quarter of bf16's rounding of the logits."""
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _above(base, column, inside, peak, GRADIENT: tl.constexpr):
    """How far logits stand above the peak, from them or from what the first pass has left in their place."""
    value = tl.load(base + column, inside, 0.0 if GRADIENT else float("-inf")).to(tl.float32)
    if GRADIENT:
        return tl.where(value < 0.0, 0.0 - value, tl.log(value))
    return value - peak


def cross_entropy(
    logits: Tensor, targets: Tensor, vocab: int, scale: float | None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The losses (N,) fp32 of logits (N, Vp), of which columns from `vocab` on are padding, and factors (N,) fp32.

    With a cap, they are softly capped first: cap tanh(logits / cap).

    With a scale, the logits become numbers which, each row times its factor, are that many times their own
    gradient; zero in the padding. Without one they stay, and the factors mean nothing.

    In bf16 on a GPU, tanh is exact only without a scale: what a validation reports does not depend on the card's own.
    """
    assert cap < 40, cap  # exp(2 cap) times the columns must stay a number
    rows, columns = logits.shape
    fast = scale is not None and logits.dtype == torch.bfloat16 and logits.is_cuda
    losses, factors = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, factors, vocab, columns, scale or 0.0, cap, BLOCK=BLOCK,
        GRADIENT=scale is not None, CAPPED=cap > 0.0, FAST=fast, num_warps=WARPS,
    )  # fmt: skip
    return losses, factors


def reference_cross_entropy(
    logits: Tensor, targets: Tensor, vocab: int, scale: float | None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    values = logits[:, :vocab].float()
    capped = cap * torch.tanh(values / cap) if cap else values
    log_probabilities = capped.log_softmax(1)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if scale is not None:
        gradient = log_probabilities.exp().scatter_add_(1, targets[:, None], torch.full_like(losses, -1.0)[:, None])
        logits[:, :vocab] = gradient * (1.0 - (capped / cap) ** 2) if cap else gradient
        logits[:, vocab:] = 0.0
    return losses, torch.full_like(losses, scale or 0.0)
