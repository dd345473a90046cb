"""How are columns summed, the same bits each time? Partial sums in fixed places, then one pass over these.

Bias and LayerNorm gradients are sums over all tokens. Atomic adds would make their order, so their last bits,
depend on timing; here each program owns a fixed share of the rows and writes its partial sum to its own row.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 16  # a program of `add_sums`
RESIDENT = 132 * 8  # programs of `_sum_columns` that run at once on a Hopper card: the rows are shared among these


@triton.jit
def _add(place, change, mask):
    total = tl.load(place, mask, 0.0).to(tl.float32) + change
    tl.store(place, total.to(place.dtype.element_ty), mask)


@triton.jit
def _add_sums(partial, out_0, out_1, out_2, programs, columns, vectors, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    vector = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        place = partial + (row[:, None] * vectors + vector) * columns + column[None, :]
        total += tl.load(place, (row < programs)[:, None] & inside[None, :], 0.0)
    if vector == 0:
        _add(out_0 + column, tl.sum(total, 0), inside)
    elif vector == 1:
        _add(out_1 + column, tl.sum(total, 0), inside)
    else:
        _add(out_2 + column, tl.sum(total, 0), inside)


def add_sums(partial: Tensor, *outs: Tensor) -> None:
    """outs[v] += partial[:, v].sum(0), for partial (P, V, C) fp32 and V up to 3 vectors (C,)."""
    programs, vectors, columns = partial.shape
    assert vectors == len(outs) <= 3
    padded = (*outs, outs[0], outs[0])[:3]
    grid = (triton.cdiv(columns, COLUMNS), vectors)
    _add_sums[grid](partial, *padded, programs, columns, vectors, ROWS=512, COLUMNS=COLUMNS, num_warps=8)


@triton.jit
def _sum_columns(x, partial, rows, columns, row_stride, group_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    group, share, shares = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed over its rows once, at the end
    for start in range(share * ROWS, rows, shares * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * row_stride + group * group_stride + column[None, :]
        total += tl.load(x + place, (row < rows)[:, None] & inside[None, :], 0.0).to(tl.float32)
    tl.store(partial + (share * tl.num_programs(1) + group) * columns + column, tl.sum(total, 0), inside)


def add_column_sums(x: Tensor, out: Tensor) -> None:
    """out += x.sum(0), for x (N, G, C) and out (G, C) of up to 3 groups, contiguous in C: bias gradients."""
    rows, groups, columns = x.shape
    blocks = triton.cdiv(columns, 128)
    shares = max(1, min(rows // 16, RESIDENT // (blocks * groups)))
    partial = torch.empty(shares, groups, columns, dtype=torch.float32, device=x.device)
    _sum_columns[(blocks, groups, shares)](
        x, partial, rows, columns, x.stride(0), x.stride(1), ROWS=16, COLUMNS=128, num_warps=4
    )
    add_sums(partial, *out)


@triton.jit
def _add_scaled(out, x, scale, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    _add(out + place, tl.load(x + place, inside, 0.0).to(tl.float32) * tl.load(scale), inside)


def add_scaled(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out += x * scale, with an fp32 scale on the device that is not rounded to bf16 before."""
    grid = (triton.cdiv(x.numel(), 2048),)
    _add_scaled[grid](out, x, scale, x.numel(), BLOCK=2048, num_warps=8)


@triton.jit
def _scale_rows(out, x, factors, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place, inside = row * columns + column, column < columns
    value = tl.load(x + place, inside, 0.0).to(tl.float32) * tl.load(factors + row)
    tl.store(out + place, value.to(out.dtype.element_ty), inside)


def scale_rows(x: Tensor, factors: Tensor, out: Tensor) -> Tensor:
    """out = x * factors[:, None], for x (N, C), which may be `out`, and factors (N,) fp32."""
    block = triton.next_power_of_2(x.shape[1])
    _scale_rows[(len(x),)](out, x, factors, x.shape[1], BLOCK=block, num_warps=max(1, block // 1024))
    return out


def reference_add_scaled(out: Tensor, x: Tensor, scale: Tensor) -> None:
    out.copy_(out.float() + x.float() * scale)


def reference_scale_rows(x: Tensor, factors: Tensor, out: Tensor) -> Tensor:
    return out.copy_(x.float() * factors[:, None])


def reference_add_column_sums(x: Tensor, out: Tensor) -> None:
    out.copy_(out.float() + x.float().sum(0))
