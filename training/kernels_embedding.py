"""How are embeddings read, and their gradients added in a fixed order?

A token may stand in a batch many times. Rows are sorted by token, stably, and one program a token and column block
adds its rows up in that order: the same bits each time, where atomic adds would depend on timing.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _add_tokens(dx, ordered, order, grad, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(0)
    token = tl.load(ordered + first).to(tl.int64)
    before = tl.load(ordered + first - 1, first > 0, -1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    if token != before:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        at = first
        more = token == token
        while more:
            place = at + tl.arange(0, ROWS)
            mine = tl.load(ordered + place, place < rows, -1) == token
            row = tl.load(order + place, mine, 0)
            mask = mine[:, None] & inside[None, :]
            total += tl.load(dx + row[:, None] * columns + column[None, :], mask, 0.0).to(tl.float32)
            at += ROWS
            more = tl.sum(mine.to(tl.int32), 0) == ROWS
        out = grad + token * columns + column
        change = tl.sum(total, 0)
        tl.store(out, (tl.load(out, inside, 0.0).to(tl.float32) + change).to(grad.dtype.element_ty), inside)


@triton.jit
def _add_positions(dx, grad, batch, length, columns, COLUMNS: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for b in range(batch):
        total += tl.load(dx + (b * length + position) * columns + column, inside, 0.0).to(tl.float32)
    out = grad + position * columns + column
    tl.store(out, (tl.load(out, inside, 0.0).to(tl.float32) + total).to(grad.dtype.element_ty), inside)


def embed(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    """(B, T) int64 -> (B T, C)."""
    columns = token_weight.shape[1]
    out = torch.empty(tokens.numel(), columns, dtype=token_weight.dtype, device=tokens.device)
    block = triton.next_power_of_2(columns)
    _embed[(tokens.numel(),)](
        tokens, token_weight, position_weight, out, tokens.shape[1], columns, BLOCK=block, num_warps=4
    )
    return out


def add_gradients(dx: Tensor, tokens: Tensor, token_grad: Tensor, position_grad: Tensor) -> None:
    """Add dx (B T, C) to the rows of the gradients (V, C) and (T, C) that it came from."""
    (batch, length), columns = tokens.shape, dx.shape[1]
    ordered, order = torch.sort(tokens.flatten().int(), stable=True)  # half the radix passes of int64
    grid = (len(ordered), triton.cdiv(columns, 512))
    _add_tokens[grid](dx, ordered, order, token_grad, len(ordered), columns, ROWS=4, COLUMNS=512, num_warps=4)
    grid = (length, triton.cdiv(columns, 1024))
    _add_positions[grid](dx, position_grad, batch, length, columns, COLUMNS=1024, num_warps=4)


def reference_embed(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    return (token_weight[tokens] + position_weight[: tokens.shape[1]]).flatten(0, 1)


def reference_add_gradients(dx: Tensor, tokens: Tensor, token_grad: Tensor, position_grad: Tensor) -> None:
    wide = torch.zeros_like(token_grad, dtype=torch.float32).index_add_(0, tokens.flatten(), dx.float())
    token_grad.copy_(token_grad.float() + wide)
    positions = dx.float().view(*tokens.shape, -1).sum(0)
    position_grad[: tokens.shape[1]] = (position_grad[: tokens.shape[1]].float() + positions).to(dx.dtype)
