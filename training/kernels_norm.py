"""How is LayerNorm run in one pass each way, with all that reads the same rows?

Forward: the residual stream and the branch that is to join it are read once. Backward: one read of the gradient,
the input and the residual stream's gradient gives the stream's new gradient, the weights' gradients, the bias
gradient of the projection before (the sum of the same stream over its rows) and, instead of having kept it,
LayerNorm's output for the weight gradient that needs it. For fp8 products the same rows are written in fp8 too.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_fp8 import Rows, reference_quantize_into, store_row
from training.kernels_reduce import add_sums

EPS = 1e-5
# Programs and warps of the backward kernel, by padded width and whether it writes fp8: as many as run at once on a
# Hopper card, and fixed, so that sums keep their order.
PROGRAMS = {
    (1024, False): (132 * 6, 2),
    (1024, True): (132 * 4, 4),
    (2048, False): (132 * 3, 4),
    (2048, True): (132 * 2, 4),
}


class Normed(NamedTuple):
    x: Tensor  # (N, C), the residual stream that was normalized
    y: Any  # (N, C), or in fp8 its rows
    mean: Tensor  # (N,) fp32
    rstd: Tensor  # (N,) fp32


@triton.jit
def _norm_forward(
    x, branch, weight, bias, y, scales, mean_out, rstd_out, columns, eps,
    HAS_BRANCH: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, inside, 0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + row * columns + column, inside, 0.0).to(tl.float32)
        total = value.to(branch.dtype.element_ty)
        tl.store(branch + row * columns + column, total, inside)
        value = total.to(tl.float32)
    mean = tl.sum(value, 0) / columns
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + eps)
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    out = tl.where(inside, centred * rstd * scale + shift, 0.0)
    if FP8:
        store_row(out, y, scales, row, row * columns + column, inside)
    else:
        tl.store(y + row * columns + column, out.to(y.dtype.element_ty), inside)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _pair_sum(a, b, c, d):
    return a + c, b + d


@triton.jit
def _norm_backward(
    dy, x, weight, bias, mean_in, rstd_in, stream, out, y, values, scales, partial, rows, columns,
    HAS_STREAM: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, step = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    sum_stream = tl.zeros((BLOCK,), tl.float32)
    place = tl.cast(program, tl.int64) * columns + column
    next_dy, next_x = tl.load(dy + place, inside, 0.0), tl.load(x + place, inside, 0.0)
    next_stream = tl.load(stream + place, inside, 0.0)
    for row in range(program, rows, step):
        place = tl.cast(row, tl.int64) * columns + column
        gradient, value, before = next_dy.to(tl.float32), next_x.to(tl.float32), next_stream
        ahead = place + step * columns  # the next row is on its way while this one is worked on
        there = column < tl.minimum(columns, (rows - row - step) * columns)  # none behind the last
        next_dy, next_x = tl.load(dy + ahead, there, 0.0), tl.load(x + ahead, there, 0.0)
        if HAS_STREAM:
            next_stream = tl.load(stream + ahead, there, 0.0)
        rstd = tl.load(rstd_in + row)
        normal = tl.where(inside, (value - tl.load(mean_in + row)) * rstd, 0.0)
        tl.store(y + place, (normal * scale + shift).to(y.dtype.element_ty), inside)
        sum_weight += gradient * normal
        sum_bias += gradient
        inner = gradient * scale
        total, product = tl.reduce((inner, inner * normal), 0, _pair_sum)
        change = (inner - total / columns - normal * (product / columns)) * rstd
        if HAS_STREAM:
            change += before.to(tl.float32)
        if FP8:
            store_row(tl.where(inside, change, 0.0), values, scales, row, place, inside)
        change = change.to(out.dtype.element_ty)
        tl.store(out + place, change, inside)
        sum_stream += change.to(tl.float32)
    place = partial + program * 3 * columns + column
    tl.store(place, sum_weight, inside)
    tl.store(place + columns, sum_bias, inside)
    tl.store(place + 2 * columns, sum_stream, inside)


def forward(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, fp8: Rows | None = None) -> Normed:
    """LayerNorm of x + branch (N, C), with the statistics that the backward pass needs.

    The sum is written over `branch`, rounded as it is normalized. With `fp8` the output is written there.
    """
    rows, columns = x.shape
    y = torch.empty_like(x) if fp8 is None else fp8
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    total = x if branch is None else branch
    _norm_forward[(rows,)](
        x, total, weight, bias, *(fp8 or (y, mean)), mean, rstd, columns, EPS,
        HAS_BRANCH=branch is not None, FP8=fp8 is not None, BLOCK=block, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return Normed(total, y, mean, rstd)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stream: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    fp8: Rows | None = None,
) -> Tensor:
    """The gradient of x plus that of the residual stream around the LayerNorm, written over `stream`.

    dy (N, C) is overwritten with LayerNorm's output. Added to `grads`: the gradients of weight and bias, and
    the sum over the rows of the result. Without `stream` the result is a new tensor. With `fp8` the result is
    also written there.
    """
    rows, columns = x.shape
    out = torch.empty_like(x) if stream is None else stream
    block = triton.next_power_of_2(columns)
    programs, warps = PROGRAMS.get((block, fp8 is not None), (132 * 2, min(4, max(1, block // 128))))
    programs = min(rows, programs)
    partial = torch.empty(programs, 3, columns, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        dy, x, weight, bias, mean, rstd, out, out, dy, *(fp8 or (out, mean)), partial, rows, columns,
        HAS_STREAM=stream is not None, FP8=fp8 is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    add_sums(partial, *grads)
    return out


def reference_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, fp8: Rows | None = None
) -> Normed:
    total = x if branch is None else branch.copy_(x.float() + branch.float())
    wide = total.float()
    mean = wide.mean(1)
    rstd = (wide.var(1, unbiased=False) + EPS).rsqrt()
    y = F.layer_norm(wide, wide.shape[1:], weight.float(), bias.float(), EPS)
    if fp8 is not None:
        return Normed(total, reference_quantize_into(fp8, y), mean, rstd)
    return Normed(total, y.to(x.dtype), mean, rstd)


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stream: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    fp8: Rows | None = None,
) -> Tensor:
    """What `backward` computes, by autograd; it takes its own statistics."""
    with torch.enable_grad():
        leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
        y = F.layer_norm(leaves[0], x.shape[1:], leaves[1], leaves[2], EPS)
        dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.float())
    out = (dx if stream is None else dx + stream.float()).to(x.dtype)
    dy.copy_(y.detach())
    if fp8 is not None:
        reference_quantize_into(fp8, out)
    for grad, change in zip(grads, (dweight, dbias, out.float().sum(0)), strict=True):
        grad.copy_(grad.float() + change)
    return out if stream is None else stream.copy_(out)
