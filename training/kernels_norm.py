"""How is LayerNorm run in one pass each way, with all that reads the same rows?

Forward: 2C in, C out in bf16. Backward: one read of the gradient, the input and the residual stream's gradient
gives the stream's new gradient, the weights' gradients, the bias gradient of the projection before (the sum of the
same stream over its rows) and, instead of having kept it, LayerNorm's output for the weight gradient that needs it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_reduce import add_sums

EPS = 1e-5
PROGRAMS = 132 * 4  # of the backward kernel: a fixed number, so that sums have a fixed order on every card


class Normed(NamedTuple):
    y: Tensor  # (N, C)
    mean: Tensor  # (N,) fp32
    rstd: Tensor  # (N,) fp32


@triton.jit
def _forward(x, weight, bias, y, mean_out, rstd_out, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, inside, 0.0).to(tl.float32)
    mean = tl.sum(value, 0) / columns
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + eps)
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    out = centred * rstd * scale + shift
    tl.store(y + row * columns + column, out.to(y.dtype.element_ty), inside)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _backward(
    dy, x, weight, bias, mean_in, rstd_in, stream, out, y, partial, rows, columns,
    HAS_STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    sum_stream = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * columns + column
        gradient = tl.load(dy + place, inside, 0.0).to(tl.float32)
        value = tl.load(x + place, inside, 0.0).to(tl.float32)
        rstd = tl.load(rstd_in + row)
        normal = tl.where(inside, (value - tl.load(mean_in + row)) * rstd, 0.0)
        tl.store(y + place, (normal * scale + shift).to(y.dtype.element_ty), inside)
        sum_weight += gradient * normal
        sum_bias += gradient
        inner = gradient * scale
        mean_inner = tl.sum(inner, 0) / columns
        mean_product = tl.sum(inner * normal, 0) / columns
        change = (inner - mean_inner - normal * mean_product) * rstd
        if HAS_STREAM:
            change += tl.load(stream + place, inside, 0.0).to(tl.float32)
        change = change.to(out.dtype.element_ty)
        tl.store(out + place, change, inside)
        sum_stream += change.to(tl.float32)
    place = partial + program * 3 * columns + column
    tl.store(place, sum_weight, inside)
    tl.store(place + columns, sum_bias, inside)
    tl.store(place + 2 * columns, sum_stream, inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Normed:
    """LayerNorm of x (N, C), with the statistics that the backward pass needs."""
    rows, columns = x.shape
    y = torch.empty_like(x)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _forward[(rows,)](
        x, weight, bias, y, mean, rstd, columns, EPS, BLOCK=block, num_warps=min(8, max(1, block // 256))
    )
    return Normed(y, mean, rstd)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stream: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The gradient of x plus that of the residual stream around the LayerNorm, written over `stream`.

    dy (N, C) is overwritten with LayerNorm's output. Added to `grads`: the gradients of weight and bias, and
    the sum over the rows of the result. Without `stream` the result is a new tensor.
    """
    rows, columns = x.shape
    out = torch.empty_like(x) if stream is None else stream
    programs = min(rows, PROGRAMS)
    partial = torch.empty(programs, 3, columns, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _backward[(programs,)](
        dy, x, weight, bias, mean, rstd, out, out, dy, partial, rows, columns,
        HAS_STREAM=stream is not None, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    add_sums(partial, *grads)
    return out


def reference_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Normed:
    wide = x.float()
    mean = wide.mean(1)
    rstd = (wide.var(1, unbiased=False) + EPS).rsqrt()
    y = F.layer_norm(wide, wide.shape[1:], weight.float(), bias.float(), EPS)
    return Normed(y.to(x.dtype), mean, rstd)


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stream: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """What `backward` computes, by autograd; it takes its own statistics."""
    with torch.enable_grad():
        leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
        y = F.layer_norm(leaves[0], x.shape[1:], leaves[1], leaves[2], EPS)
        dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.float())
    out = (dx if stream is None else dx + stream.float()).to(x.dtype)
    dy.copy_(y.detach())
    for grad, change in zip(grads, (dweight, dbias, out.float().sum(0)), strict=True):
        grad.copy_(grad.float() + change)
    return out if stream is None else stream.copy_(out)
