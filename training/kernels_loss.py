"""How do a chunk's logits become its losses and their own gradient, in place? One program a row, one pass over it.

The gradient of a row is its exponentials over their sum, less one at the target. The sum is known only at the end of
the row, so the row is left as exponentials, and `factors` says what they are still to be multiplied by. The products
that follow sum over the row or over the tokens: either way the factor can wait for the narrow side.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


@triton.jit
def _cross_entropy(
    logits, targets, losses, factors, vocab, columns, scale, cap, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * columns
    target = tl.load(targets + row)
    # The target's own logit serves as the peak, which spares the search for the highest one.
    peak, top = tl.load(base + target).to(tl.float32), 0.0
    slope = 1.0
    if CAPPED:
        peak, slope = _capped(peak, cap)
    tl.debug_barrier()  # every warp has read it before any overwrites it
    lanes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(base + column, column < vocab, float("-inf")).to(tl.float32)
        if CAPPED:
            value, slopes = _capped(value, cap)
            value = tl.where(column < vocab, value, float("-inf"))
        above = value - peak
        far = above > 85.0
        power = tl.exp(above)
        lanes += tl.where(far, float("inf"), power)
        if CAPPED:
            power *= slopes
        if GRADIENT:  # a negative number stands for the exponent itself, where the power is too large a number
            tl.store(base + column, tl.where(far, -above, power).to(logits.dtype.element_ty), column < columns)
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
def _capped(value, cap):
    """cap tanh(value / cap), and its derivative."""
    part = 2.0 / (1.0 + tl.exp(-2.0 / cap * value)) - 1.0
    return cap * part, 1.0 - part * part


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
    """
    rows, columns = logits.shape
    losses, factors = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, factors, vocab, columns, scale or 0.0, cap, BLOCK=BLOCK,
        GRADIENT=scale is not None, CAPPED=cap > 0.0, num_warps=WARPS,
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
