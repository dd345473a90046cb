"""How do a chunk's logits become its losses and their own gradient, in place? One program a row."""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 8


@triton.jit
def _sum_of_exps(base, peak, vocab, columns, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(base + column, column < vocab, float("-inf")).to(tl.float32)
        total += tl.exp(value - peak)
    return tl.sum(total, 0)


@triton.jit
def _cross_entropy(logits, targets, losses, vocab, columns, scale, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * columns
    target = tl.load(targets + row)
    at_target = tl.load(base + target).to(tl.float32)
    # The target's own logit serves as the peak: one exponential, no maximum. Where another logit is so much
    # higher that the sum overflows, a second pass takes the true maximum.
    peak = at_target
    total = _sum_of_exps(base, peak, vocab, columns, BLOCK)
    if total > 1e38:
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(base + column, column < vocab, float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, value)
        peak = tl.max(highest, 0)
        total = _sum_of_exps(base, peak, vocab, columns, BLOCK)
    log_sum = peak + tl.log(total)
    tl.store(losses + row, log_sum - at_target)
    if GRADIENT:
        for done in range(0, columns, BLOCK):  # backwards: the end of the row is still in the cache
            column = (tl.cdiv(columns, BLOCK) - 1) * BLOCK - done + tl.arange(0, BLOCK)
            value = tl.load(base + column, column < vocab, float("-inf")).to(tl.float32)
            gradient = tl.exp(value - log_sum) - tl.where(column == target, 1.0, 0.0)
            tl.store(base + column, (gradient * scale).to(logits.dtype.element_ty), column < columns)


def cross_entropy(logits: Tensor, targets: Tensor, vocab: int, scale: float | None) -> Tensor:
    """The losses (N,) fp32 of logits (N, Vp), of which columns from `vocab` on are padding.

    With a scale, the logits become that many times their own gradient; zero in the padding.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, vocab, columns, scale or 0.0, BLOCK=BLOCK, GRADIENT=scale is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return losses


def reference_cross_entropy(logits: Tensor, targets: Tensor, vocab: int, scale: float | None) -> Tensor:
    log_probabilities = logits[:, :vocab].float().log_softmax(1)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if scale is not None:
        gradient = log_probabilities.exp().scatter_add_(1, targets[:, None], torch.full_like(losses, -1.0)[:, None])
        logits[:, :vocab] = gradient * scale
        logits[:, vocab:] = 0.0
    return losses
