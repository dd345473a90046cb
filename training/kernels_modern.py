"""How do the parts that only the speed recipe's model has run in one pass each? RMSNorm, rotary q and k, squared ReLU.

RMSNorm has no parameters, so its backward pass needs its output's statistics alone. Queries and keys are rotated and
normalized in place: what is kept of them is what attention reads, and their gradients come back from it. For fp8
products the same rows are written in fp8 too.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_fp8 import Rows, reference_quantize_into, scale_of, store_row
from training.modern import EPS, norm, rotate

HEADS = 16  # of queries and keys, a program


@triton.jit
def _norm_forward(
    x, branch, y, scales, rstd_out, columns, eps, HAS_BRANCH: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if HAS_BRANCH:
        total = (value + tl.load(branch + place, inside, 0.0).to(tl.float32)).to(branch.dtype.element_ty)
        tl.store(branch + place, total, inside)
        value = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    if FP8:
        store_row(value * rstd, y, scales, row, place, inside)
    else:
        tl.store(y + place, (value * rstd).to(y.dtype.element_ty), inside)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _norm_backward(
    dy, x, rstd_in, stream, out, values, scales, columns,
    HAS_STREAM: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    gradient = tl.load(dy + place, inside, 0.0).to(tl.float32)
    rstd = tl.load(rstd_in + row)
    normal = tl.load(x + place, inside, 0.0).to(tl.float32) * rstd
    change = (gradient - normal * (tl.sum(gradient * normal, 0) / columns)) * rstd
    if HAS_STREAM:
        change += tl.load(stream + place, inside, 0.0).to(tl.float32)
    tl.store(dy + place, normal.to(dy.dtype.element_ty), inside)
    tl.store(out + place, change.to(out.dtype.element_ty), inside)
    if FP8:
        store_row(change, values, scales, row, place, inside)


def norm_forward(x: Tensor, branch: Tensor | None, fp8: Rows | None = None) -> tuple[Tensor, Any, Tensor]:
    """x + branch (N, C), written over `branch`; its RMSNorm, with `fp8` written there; and 1 / RMS (N,) fp32."""
    rows, columns = x.shape
    y, rstd = fp8 or torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total, block = x if branch is None else branch, triton.next_power_of_2(columns)
    _norm_forward[(rows,)](
        x, total, *(fp8 or (y, rstd)), rstd, columns, EPS,
        HAS_BRANCH=branch is not None, FP8=fp8 is not None, BLOCK=block, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return total, y, rstd


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, stream: Tensor | None, fp8: Rows | None = None) -> Tensor:
    """The gradient of x (N, C) plus that of the residual stream, written over `stream`; dy becomes RMSNorm's output.

    With `fp8` the result is also written there.
    """
    rows, columns = x.shape
    out, block = torch.empty_like(x) if stream is None else stream, triton.next_power_of_2(columns)
    _norm_backward[(rows,)](
        dy, x, rstd, out, out, *(fp8 or (out, rstd)), columns,
        HAS_STREAM=stream is not None, FP8=fp8 is not None, BLOCK=block, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return out


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def _heads(count, length, heads, HALF: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr):
    """Of a program's rows, each a head of q or one of k behind those of q: number, whether it is there, place of the
    first half, angle. SHARE of the ROWS are the program's own."""
    row = tl.program_id(0).to(tl.int64) * SHARE + tl.arange(0, ROWS)
    there = (row < count) & (tl.arange(0, ROWS) < SHARE)
    token, head, pair = row // (2 * heads), row % (2 * heads), tl.arange(0, HALF)[None, :]
    place = ((token * 3 * heads + head) * 2 * HALF)[:, None] + pair
    return row, there, place, ((token % length) * HALF)[:, None] + pair, there[:, None]


@triton.jit
def _rotate_forward(qkv, cos_in, sin_in, rstd_out, count, length, heads, eps, HALF: tl.constexpr, ROWS: tl.constexpr):
    row, there, place, angle, inside = _heads(count, length, heads, HALF, ROWS, ROWS)
    cos, sin = tl.load(cos_in + angle, inside, 0.0), tl.load(sin_in + angle, inside, 0.0)
    first = tl.load(qkv + place, inside, 0.0).to(tl.float32)
    second = tl.load(qkv + place + HALF, inside, 0.0).to(tl.float32)
    first, second = _turn(first, second, cos, sin)
    rstd = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
    tl.store(qkv + place, (first * rstd[:, None]).to(qkv.dtype.element_ty), inside)
    tl.store(qkv + place + HALF, (second * rstd[:, None]).to(qkv.dtype.element_ty), inside)
    tl.store(rstd_out + row, rstd, there)


@triton.jit
def _rotate_backward(
    grad, qkv, cos_in, sin_in, rstd_in, values, scales, count, length, heads,
    HALF: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, there, place, angle, inside = _heads(count, length, heads, HALF, ROWS, SHARE)
    cos, sin = tl.load(cos_in + angle, inside, 0.0), tl.load(sin_in + angle, inside, 0.0)
    rstd = tl.load(rstd_in + row, there, 0.0)[:, None]
    first = tl.load(grad + place, inside, 0.0).to(tl.float32)
    second = tl.load(grad + place + HALF, inside, 0.0).to(tl.float32)
    normal_1 = tl.load(qkv + place, inside, 0.0).to(tl.float32)
    normal_2 = tl.load(qkv + place + HALF, inside, 0.0).to(tl.float32)
    along = ((tl.sum(first * normal_1, 1) + tl.sum(second * normal_2, 1)) / (2 * HALF))[:, None]
    first, second = (first - normal_1 * along) * rstd, (second - normal_2 * along) * rstd
    first, second = _turn(first, second, cos, 0.0 - sin)
    tl.store(grad + place, first.to(grad.dtype.element_ty), inside)
    tl.store(grad + place + HALF, second.to(grad.dtype.element_ty), inside)
    if FP8:  # a program has a token, whose values' gradient ends its row
        token, width = tl.program_id(0).to(tl.int64), heads * 2 * HALF
        column = tl.arange(0, BLOCK)
        end, behind = token * 3 * width + 2 * width + column, column < width
        value = tl.load(grad + end, behind, 0.0).to(tl.float32)
        turned = tl.maximum(tl.abs(first), tl.abs(second))
        scale = scale_of(tl.maximum(tl.max(tl.max(turned, 1), 0), tl.max(tl.abs(value), 0)))
        tl.store(scales + token, scale)
        tl.store(values + place, (first * (1.0 / scale)).to(values.dtype.element_ty), inside)
        tl.store(values + place + HALF, (second * (1.0 / scale)).to(values.dtype.element_ty), inside)
        tl.store(values + end, (value * (1.0 / scale)).to(values.dtype.element_ty), behind)


def rotate_forward(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate and normalize queries and keys of qkv (B, T, 3, H, D) in place -> 1 / RMS (B T, 2 H) fp32.

    cos and sin: (T, D / 2) fp32. D must be a power of two.
    """
    B, T, _, H, D = qkv.shape
    rstd = torch.empty(B * T, 2 * H, dtype=torch.float32, device=qkv.device)
    _rotate_forward[(triton.cdiv(B * T * 2 * H, HEADS),)](
        qkv, cos, sin, rstd, B * T * 2 * H, T, H, EPS, HALF=D // 2, ROWS=HEADS, num_warps=4
    )
    return rstd


def rotate_backward(grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, fp8: Rows | None = None) -> None:
    """The gradients of queries and keys in `grad`, behind `rotate_forward` -> before it, in place.

    With `fp8` (B T, 3 C) the whole of `grad` is also written there.
    """
    B, T, _, H, D = qkv.shape
    share, rows = (HEADS, HEADS) if fp8 is None else (2 * H, triton.next_power_of_2(2 * H))
    _rotate_backward[(triton.cdiv(B * T * 2 * H, share),)](
        grad, qkv, cos, sin, rstd, *(fp8 or (grad, rstd)), B * T * 2 * H, T, H,
        HALF=D // 2, ROWS=rows, SHARE=share, FP8=fp8 is not None, BLOCK=triton.next_power_of_2(H * D),
        num_warps=4 if rows * D <= 2048 else 8,
    )  # fmt: skip


@triton.jit
def _relu2_forward(h, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.maximum(tl.load(h + place, inside, 0.0).to(tl.float32), 0.0)
    tl.store(h + place, (value * value).to(h.dtype.element_ty), inside)


@triton.jit
def _relu2_backward(dg, g, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.sqrt(tl.load(g + place, inside, 0.0).to(tl.float32))
    gradient = tl.load(dg + place, inside, 0.0).to(tl.float32)
    tl.store(dg + place, (2.0 * value * gradient).to(dg.dtype.element_ty), inside)


def relu2_forward(h: Tensor) -> None:
    """Squared ReLU, in place: its backward pass needs its output alone."""
    _relu2_forward[(triton.cdiv(h.numel(), 2048),)](h, h.numel(), BLOCK=2048, num_warps=8)


def relu2_backward(dg: Tensor, g: Tensor) -> None:
    """The gradient of squared ReLU's output g -> of its input, in place."""
    _relu2_backward[(triton.cdiv(g.numel(), 2048),)](dg, g, g.numel(), BLOCK=2048, num_warps=8)


def reference_norm_forward(x: Tensor, branch: Tensor | None, fp8: Rows | None = None) -> tuple[Tensor, Any, Tensor]:
    total = x if branch is None else branch.copy_(x.float() + branch.float())
    rstd = (total.float().square().mean(1) + EPS).rsqrt()
    y = norm(total.float())
    return total, y.to(x.dtype) if fp8 is None else reference_quantize_into(fp8, y), rstd


def reference_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, stream: Tensor | None, fp8: Rows | None = None
) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        y = norm(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy.float())
    dy.copy_(y.detach())
    change = dx if stream is None else dx + stream.float()
    if fp8 is not None:
        reference_quantize_into(fp8, change)
    return change.to(x.dtype) if stream is None else stream.copy_(change)


def reference_rotate_forward(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = [rotate(qkv[:, :, i].float(), cos, sin) for i in (0, 1)]
    rstd = torch.stack([(t.square().mean(-1) + EPS).rsqrt() for t in turned], 2)  # (B, T, 2, H)
    for i, each in enumerate(turned):
        qkv[:, :, i] = norm(each).to(qkv.dtype)
    return rstd.flatten(2).flatten(0, 1)


def reference_rotate_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, fp8: Rows | None = None
) -> None:
    B, T, _, H, _ = qkv.shape
    scales, turned = rstd.view(B, T, 2, H, 1), grad.float()
    for i in (0, 1):
        normal, change = qkv[:, :, i].float(), turned[:, :, i]
        change = (change - normal * (change * normal).mean(-1, keepdim=True)) * scales[:, :, i]
        turned[:, :, i] = rotate(change, cos, -sin)
    grad.copy_(turned)
    if fp8 is not None:
        reference_quantize_into(fp8, turned.view(B * T, -1))


def reference_relu2_forward(h: Tensor) -> None:
    h.copy_(F.relu(h.float()).square())


def reference_relu2_backward(dg: Tensor, g: Tensor) -> None:
    dg.copy_(2.0 * g.float().sqrt() * dg.float())
