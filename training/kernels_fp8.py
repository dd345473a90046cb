"""How do rows become fp8, in the pass that makes them?

Each row gets its own scale, its largest magnitude over 448 (the largest number of e4m3): a kernel that holds a row
knows it at once, so nothing depends on an earlier step, and an outlier costs precision in its own row only.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_gelu import gate
from training.kernels_reduce import add_sums

LARGEST = 448.0
DTYPE = torch.float8_e4m3fn
PROGRAMS = 132 * 2  # of the kernels that also sum columns
SHARES = 16  # of a weight's rows, for its columns' largest magnitudes


class Rows(NamedTuple):
    """A tensor in fp8 whose rows have a scale each: values * scales[:, None] is meant."""

    values: Tensor  # (N, K) e4m3
    scales: Tensor  # (N,) fp32


@triton.jit
def scale_of(peak):
    """The scale of a row whose largest magnitude is `peak`: 448 is e4m3's largest number. Dust becomes zero."""
    return tl.where(peak > 1e-30, peak / 448.0, 1.0)


@triton.jit
def store_row(value, values, scales, row, place, inside):
    """Write a row in fp8, and its scale; `value` is zero where it is not `inside`."""
    scale = scale_of(tl.max(tl.abs(value), 0))
    tl.store(scales + row, scale)
    tl.store(values + place, (value * (1.0 / scale)).to(values.dtype.element_ty), inside)


@triton.jit
def _quantize_rows(x, values, scales, partial, rows, columns, SUM: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * columns + column
        value = tl.load(x + place, inside, 0.0).to(tl.float32)
        store_row(value, values, scales, row, place, inside)
        if SUM:
            total += value
    if SUM:
        tl.store(partial + program * columns + column, total, inside)


@triton.jit
def _gelu_quantize(h, values, scales, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    x = tl.load(h + place, inside, 0.0).to(tl.float32)
    store_row(x * gate(x), values, scales, row, place, inside)


@triton.jit
def _gelu_backward_quantize(dg, h, values, scales, partial, rows, columns, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * columns + column
        x = tl.load(h + place, inside, 0.0).to(tl.float32)
        gradient = tl.load(dg + place, inside, 0.0).to(tl.float32)
        open_ = gate(x)
        slope = open_ + x * open_ * (1.0 - open_) * (1.0 + 0.134145 * x * x) * 1.5957691216057308
        change = gradient * slope
        tl.store(h + place, (x * open_).to(h.dtype.element_ty), inside)
        tl.store(dg + place, change.to(dg.dtype.element_ty), inside)
        store_row(change, values, scales, row, place, inside)
        total += change
    tl.store(partial + program * columns + column, total, inside)


@triton.jit
def _relu2_quantize(h, values, scales, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    value = tl.maximum(tl.load(h + place, inside, 0.0).to(tl.float32), 0.0)
    value = value * value
    tl.store(h + place, value.to(h.dtype.element_ty), inside)
    store_row(value, values, scales, row, place, inside)


@triton.jit
def _relu2_backward_quantize(dg, g, values, scales, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    value = tl.sqrt(tl.load(g + place, inside, 0.0).to(tl.float32))
    change = 2.0 * value * tl.load(dg + place, inside, 0.0).to(tl.float32)
    tl.store(dg + place, change.to(dg.dtype.element_ty), inside)
    store_row(change, values, scales, row, place, inside)


@triton.jit
def _column_peaks(w, peaks, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    share, shares = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(share * ROWS, rows, shares * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(w + row[:, None].to(tl.int64) * columns + column[None, :], mask, 0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(value))
    tl.store(peaks + share * columns + column, tl.max(peak, 0), inside)


@triton.jit
def _quantize_transposed(w, peaks, scales, values, rows, columns, SHARES: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    share = tl.arange(0, SHARES)
    inside = (column < columns)[None, :]
    scale = scale_of(tl.max(tl.load(peaks + share[:, None] * columns + column[None, :], inside, 0.0), 0))
    if tl.program_id(0) == 0:
        tl.store(scales + column, scale, column < columns)
    mask = (row < rows)[:, None] & inside
    value = tl.load(w + row[:, None].to(tl.int64) * columns + column[None, :], mask, 0.0).to(tl.float32)
    turned = tl.trans(value * (1.0 / scale)[None, :]).to(values.dtype.element_ty)
    mask = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(values + column[:, None].to(tl.int64) * rows + row[None, :], turned, mask)


def empty(rows: int, columns: int, like: Tensor) -> Rows:
    values = torch.empty(rows, columns, dtype=DTYPE, device=like.device)
    return Rows(values, torch.empty(rows, dtype=torch.float32, device=like.device))


def rows_like(x: Tensor) -> Rows:
    return empty(x.shape[0], x.shape[1], x)


def quantize(x: Tensor, add_sums_to: Tensor | None = None) -> Rows:
    """x (N, K) in fp8 by rows; its sum over the rows is added to a bias gradient on the way if wanted."""
    rows, columns = x.shape
    out, block = empty(rows, columns, x), triton.next_power_of_2(columns)
    programs = rows if add_sums_to is None else min(rows, PROGRAMS)
    sums = 0 if add_sums_to is None else programs
    partial = torch.empty(sums, 1, columns, dtype=torch.float32, device=x.device)
    _quantize_rows[(programs,)](
        x,
        *out,
        partial,
        rows,
        columns,
        SUM=add_sums_to is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    if add_sums_to is not None:
        add_sums(partial, add_sums_to)
    return out


def quantize_transposed(w: Tensor) -> Rows:
    """The transpose of w (N, K), (K, N), in fp8 by its rows."""
    rows, columns = w.shape
    out = empty(columns, rows, w)
    peaks = torch.empty(SHARES, columns, dtype=torch.float32, device=w.device)
    grid = (triton.cdiv(columns, 64), SHARES)
    _column_peaks[grid](w, peaks, rows, columns, ROWS=32, COLUMNS=64, num_warps=4)
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
    _quantize_transposed[grid](w, peaks, out.scales, out.values, rows, columns, SHARES=SHARES, SIZE=64, num_warps=4)
    return out


def gelu(h: Tensor) -> Rows:
    """GELU of h (N, F) in fp8 by rows."""
    rows, columns = h.shape
    out, block = empty(rows, columns, h), triton.next_power_of_2(columns)
    warps = min(8, max(1, block // 1024))
    _gelu_quantize[(rows,)](h, *out, columns, BLOCK=block, num_warps=warps)
    return out


def gelu_backward(dg: Tensor, h: Tensor, bias_grad: Tensor) -> Rows:
    """dg (N, F) becomes the gradient of h, h becomes GELU's output -> the gradient in fp8 by rows too.

    The gradient's sum over the rows is added to `bias_grad`.
    """
    rows, columns = h.shape
    out, block = empty(rows, columns, h), triton.next_power_of_2(columns)
    programs = min(rows, PROGRAMS)
    partial = torch.empty(programs, 1, columns, dtype=torch.float32, device=h.device)
    _gelu_backward_quantize[(programs,)](
        dg, h, *out, partial, rows, columns, BLOCK=block, num_warps=min(32, max(1, block // 256))
    )
    add_sums(partial, bias_grad)
    return out


def relu2(h: Tensor) -> Rows:
    """Squared ReLU of h (N, F), in place and in fp8 by rows."""
    rows, columns = h.shape
    out, block = empty(rows, columns, h), triton.next_power_of_2(columns)
    _relu2_quantize[(rows,)](h, *out, columns, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out


def relu2_backward(dg: Tensor, g: Tensor) -> Rows:
    """The gradient of squared ReLU's output g (N, F) -> of its input, in place and in fp8 by rows."""
    rows, columns = g.shape
    out, block = empty(rows, columns, g), triton.next_power_of_2(columns)
    _relu2_backward_quantize[(rows,)](dg, g, *out, columns, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out


def reference_quantize(x: Tensor, add_sums_to: Tensor | None = None) -> Rows:
    peak = x.float().abs().amax(1)
    scales = torch.where(peak > 1e-30, peak / LARGEST, 1.0)
    if add_sums_to is not None:
        add_sums_to.copy_(add_sums_to.float() + x.float().sum(0))
    return Rows((x.float() / scales[:, None]).to(DTYPE), scales)


def reference_quantize_into(out: Rows, x: Tensor) -> Rows:
    for place, value in zip(out, reference_quantize(x), strict=True):
        place.copy_(value)
    return out


def reference_quantize_transposed(w: Tensor) -> Rows:
    return reference_quantize(w.t())


def reference_gelu(h: Tensor) -> Rows:
    return reference_quantize(F.gelu(h.float(), approximate="tanh"))


def reference_gelu_backward(dg: Tensor, h: Tensor, bias_grad: Tensor) -> Rows:
    with torch.enable_grad():
        leaf = h.detach().float().requires_grad_()
        g = F.gelu(leaf, approximate="tanh")
        (dh,) = torch.autograd.grad(g, leaf, dg.float())
    dg.copy_(dh)
    h.copy_(g.detach())
    return reference_quantize(dh, add_sums_to=bias_grad)


def reference_relu2(h: Tensor) -> Rows:
    g = F.relu(h.float()).square()
    h.copy_(g)
    return reference_quantize(g)


def reference_relu2_backward(dg: Tensor, g: Tensor) -> Rows:
    dh = 2.0 * g.float().sqrt() * dg.float()
    dg.copy_(dh)
    return reference_quantize(dh)


def dequantize(rows: Rows) -> Tensor:
    return rows.values.float() * rows.scales[:, None]
