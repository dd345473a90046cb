"""How are embeddings read, and their gradients added in a fixed order?

A token may stand in a batch many times, a frequent one thousands of times. Rows are sorted by token, stably, and cut
into parts of ROWS: one program adds up the runs of its part, and what runs over the edges of parts is added up after
that. The same bits each time, where atomic adds would depend on timing, and no program waits for a frequent token.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_reduce import _add

ROWS, COLUMNS, WARPS = 64, 256, 2


@triton.jit
def _embed(tokens, token_weight, position_weight, out, length, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    token = tl.load(tokens + row)
    value = tl.load(token_weight + token * columns + column, inside, 0.0).to(tl.float32)
    value += tl.load(position_weight + (row % length) * columns + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), inside)


@triton.jit
def _add_runs(dx, ordered, order, grad, edges, edge_tokens, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of ROWS sorted rows: runs of a token that begin and end within are added to its gradient.

    The sums of the first and the last run, which may go on outside, are left in `edges`.
    """
    part = tl.program_id(0)
    start = part * ROWS
    stop = tl.minimum(start + ROWS, rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    edge = edges + 2 * part.to(tl.int64) * columns + column
    tl.store(edge, tl.zeros((COLUMNS,), tl.float32), inside)  # stays so where one run fills the part
    token, runs = tl.load(ordered + start), 0
    tl.store(edge_tokens + 2 * part, token)
    total = tl.zeros((COLUMNS,), tl.float32)
    ahead = tl.load(dx + tl.load(order + start) * columns + column, inside, 0.0)
    for at in range(start, stop):
        total += ahead.to(tl.float32)
        more = at + 1 < stop
        following = tl.load(ordered + at + 1, more, -1)
        ahead = tl.load(dx + tl.load(order + at + 1, more, 0) * columns + column, inside, 0.0)
        if following != token:
            if at + 1 == stop:
                tl.store(edge + columns, total, inside)
                tl.store(edge_tokens + 2 * part + 1, token)
            elif runs == 0:
                tl.store(edge, total, inside)
            else:
                _add(grad + token.to(tl.int64) * columns + column, total, inside)
            total = tl.zeros((COLUMNS,), tl.float32)
            token, runs = following, runs + 1


@triton.jit
def _add_edges(edges, tokens, grad, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of `edges` that have the same token, which follow one another, are added to its gradient."""
    first = tl.program_id(0)
    token = tl.load(tokens + first).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    if token != tl.load(tokens + first - 1, first > 0, -1):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        at = first
        more = token == token
        while more:
            row = at + tl.arange(0, ROWS)
            mine = tl.load(tokens + row, row < rows, -1) == token
            place = row[:, None].to(tl.int64) * columns + column[None, :]
            total += tl.load(edges + place, mine[:, None] & inside[None, :], 0.0)
            at += ROWS
            more = tl.sum(mine.to(tl.int32), 0) == ROWS
        _add(grad + token * columns + column, tl.sum(total, 0), inside)


@triton.jit
def _add_positions(dx, grad, batch, length, columns, COLUMNS: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for b in range(batch):
        total += tl.load(dx + (b * length + position) * columns + column, inside, 0.0).to(tl.float32)
    _add(grad + position * columns + column, total, inside)


def embed(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    """(B, T) int64 -> (B T, C)."""
    columns = token_weight.shape[1]
    out = torch.empty(tokens.numel(), columns, dtype=token_weight.dtype, device=tokens.device)
    block = triton.next_power_of_2(columns)
    _embed[(tokens.numel(),)](
        tokens, token_weight, position_weight, out, tokens.shape[1], columns, BLOCK=block, num_warps=4
    )
    return out


def add_gradients(dx: Tensor, tokens: Tensor, token_grad: Tensor, position_grad: Tensor | None) -> None:
    """Add dx (B T, C) to the rows of the gradients (V, C) and, where there are positions, (T, C) that it came from."""
    (batch, length), columns = tokens.shape, dx.shape[1]
    ordered, order = torch.sort(tokens.flatten().int(), stable=True)  # half the radix passes of int64
    parts, blocks = triton.cdiv(len(ordered), ROWS), triton.cdiv(columns, COLUMNS)
    edges = torch.empty(2 * parts, columns, dtype=torch.float32, device=dx.device)
    edge_tokens = torch.empty(2 * parts, dtype=torch.int32, device=dx.device)
    _add_runs[(parts, blocks)](
        dx, ordered, order, token_grad, edges, edge_tokens, len(ordered), columns, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=WARPS,
    )  # fmt: skip
    _add_edges[(2 * parts, blocks)](edges, edge_tokens, token_grad, 2 * parts, columns, ROWS=8, COLUMNS=COLUMNS)
    if position_grad is not None:
        grid = (length, triton.cdiv(columns, 1024))
        _add_positions[grid](dx, position_grad, batch, length, columns, COLUMNS=1024, num_warps=4)


def reference_embed(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    return (token_weight[tokens] + position_weight[: tokens.shape[1]]).flatten(0, 1)


def reference_add_gradients(dx: Tensor, tokens: Tensor, token_grad: Tensor, position_grad: Tensor | None) -> None:
    wide = torch.zeros_like(token_grad, dtype=torch.float32).index_add_(0, tokens.flatten(), dx.float())
    token_grad.copy_(token_grad.float() + wide)
    if position_grad is not None:
        positions = dx.float().view(*tokens.shape, -1).sum(0)
        position_grad[: tokens.shape[1]] = (position_grad[: tokens.shape[1]].float() + positions).to(dx.dtype)
