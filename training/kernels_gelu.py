"""How is GELU run in one pass each way? Its backward also sums the bias gradient of the layer before.

GPT-2's GELU is the tanh form, which is x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3): one exponential.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from training.kernels_reduce import add_sums

SHARES = 32  # of the rows, in the backward kernel


@triton.jit
def gate(x):
    return 1.0 / (1.0 + tl.exp(x * (1.0 + 0.044715 * x * x) * -1.5957691216057308))  # sigmoid(2u), 2 sqrt(2/pi)


@triton.jit
def _gelu_forward(h, g, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    x = tl.load(h + place, inside, 0.0).to(tl.float32)
    tl.store(g + place, (x * gate(x)).to(g.dtype.element_ty), inside)


@triton.jit
def _gelu_backward(dg, h, partial, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    share, shares = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed over its rows once, at the end
    for start in range(share * ROWS, rows, shares * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(h + place, mask, 0.0).to(tl.float32)
        gradient = tl.load(dg + place, mask, 0.0).to(tl.float32)
        open_ = gate(x)
        slope = open_ + x * open_ * (1.0 - open_) * (1.0 + 0.134145 * x * x) * 1.5957691216057308
        out = (gradient * slope).to(dg.dtype.element_ty)
        tl.store(dg + place, out, mask)
        total += out.to(tl.float32)  # masked gradients are 0
    tl.store(partial + share * columns + column, tl.sum(total, 0), inside)


def forward(h: Tensor) -> Tensor:
    g = torch.empty_like(h)
    _gelu_forward[(triton.cdiv(h.numel(), 2048),)](h, g, h.numel(), BLOCK=2048, num_warps=8)
    return g


def backward(dg: Tensor, h: Tensor, bias_grad: Tensor) -> Tensor:
    """dg (N, F) becomes the gradient of h; its sum over the rows is added to `bias_grad`."""
    rows, columns = h.shape
    shares = max(1, min(SHARES, rows // 16))
    partial = torch.empty(shares, 1, columns, dtype=torch.float32, device=h.device)
    grid = (triton.cdiv(columns, 256), shares)
    _gelu_backward[grid](dg, h, partial, rows, columns, ROWS=16, COLUMNS=256, num_warps=8)
    add_sums(partial, bias_grad)
    return dg


def reference_forward(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def reference_backward(dg: Tensor, h: Tensor, bias_grad: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = h.detach().float().requires_grad_()
        (dh,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, dg.float())
    dg.copy_(dh)
    bias_grad.copy_(bias_grad.float() + dg.float().sum(0))
    return dg
