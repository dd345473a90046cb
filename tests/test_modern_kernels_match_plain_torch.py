"""Do the Triton kernels of the speed recipe's model compute what plain PyTorch and autograd do?"""

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from training import kernels_modern as kernels  # noqa: E402
from training.kernels_fp8 import Rows, dequantize, empty, rows_like  # noqa: E402
from training.modern import norm, rotate, rotations  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 4e-2}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((value.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < TOLERANCE[dtype], error


@DTYPES
@pytest.mark.parametrize("more", [True, False])
def test_rmsnorm_of_the_stream_both_ways(dtype: torch.dtype, more: bool) -> None:
    results = []
    for forward, backward in (
        (kernels.norm_forward, kernels.norm_backward),
        (kernels.reference_norm_forward, kernels.reference_norm_backward),
    ):
        x, y, rstd = forward(draw(7, 48, dtype=dtype), draw(7, 48, dtype=dtype, seed=1) if more else None)
        dy, stream = draw(7, 48, dtype=dtype, seed=2), draw(7, 48, dtype=dtype, seed=3) if more else None
        results.append((x, y, rstd, backward(dy, x, rstd, stream), dy))
    for value, expected in zip(*results, strict=True):
        assert_near(value, expected, dtype)


@DTYPES
@pytest.mark.parametrize("which", ["triton", "plain"])
def test_rotation_and_its_gradient(dtype: torch.dtype, which: str) -> None:
    forward, backward = (
        (kernels.rotate_forward, kernels.rotate_backward)
        if which == "triton"
        else (kernels.reference_rotate_forward, kernels.reference_rotate_backward)
    )
    B, T, H, D = 2, 5, 3, 16
    cos, sin = rotations(T, D, torch.device(DEVICE))
    leaf = draw(B, T, 3, H, D, dtype=dtype).float().requires_grad_()
    expected = torch.stack([norm(rotate(leaf[:, :, i], cos, sin)) if i < 2 else leaf[:, :, i] for i in range(3)], 2)
    gradient = draw(B, T, 3, H, D, dtype=dtype, seed=1)
    (expected_grad,) = torch.autograd.grad(expected, leaf, gradient.float())
    qkv = draw(B, T, 3, H, D, dtype=dtype)
    rstd = forward(qkv, cos, sin)
    assert_near(qkv, expected, dtype)
    backward(gradient, qkv, cos, sin, rstd)
    assert_near(gradient, expected_grad, dtype)


def assert_same_rows(rows: Rows, expected: Rows, dtype: torch.dtype) -> None:
    torch.testing.assert_close(rows.scales, expected.scales, rtol=TOLERANCE[dtype], atol=0)
    value, meant = dequantize(rows), dequantize(expected)
    # Triton's interpreter cuts off where a GPU rounds to the nearest
    assert (value - meant).norm() < (0.15 if DEVICE == "cpu" else 0.03) * meant.norm()


@DTYPES
@pytest.mark.parametrize("more", [True, False])
def test_rmsnorm_writes_fp8_rows_too(dtype: torch.dtype, more: bool) -> None:
    results = []
    for forward, backward in (
        (kernels.norm_forward, kernels.norm_backward),
        (kernels.reference_norm_forward, kernels.reference_norm_backward),
    ):
        x, branch = draw(7, 48, dtype=dtype), draw(7, 48, dtype=dtype, seed=1) if more else None
        x, y8, rstd = forward(x, branch, rows_like(x))
        dy, stream = draw(7, 48, dtype=dtype, seed=2), draw(7, 48, dtype=dtype, seed=3) if more else None
        dx8 = rows_like(x)
        results.append((y8, dx8, x, rstd, backward(dy, x, rstd, stream, dx8), dy))
    for value, expected in zip(*(r[:2] for r in results), strict=True):
        assert_same_rows(value, expected, dtype)
    for value, expected in zip(*(r[2:] for r in results), strict=True):
        assert_near(value, expected, dtype)
    assert_near(dequantize(results[1][0]), norm(results[1][2].float()), torch.float8_e4m3fn)


@DTYPES
@pytest.mark.parametrize("heads", [3, 4])
def test_gradients_of_the_rotation_in_fp8_hold_those_of_the_values(dtype: torch.dtype, heads: int) -> None:
    B, T, D = 2, 5, 16
    cos, sin = rotations(T, D, torch.device(DEVICE))
    qkv = draw(B, T, 3, heads, D, dtype=dtype)
    rstd = kernels.reference_rotate_forward(qkv, cos, sin)
    results = []
    for backward in (kernels.rotate_backward, kernels.reference_rotate_backward):
        gradient = draw(B, T, 3, heads, D, dtype=dtype, seed=1)
        rows = empty(B * T, 3 * heads * D, gradient)
        backward(gradient, qkv, cos, sin, rstd, rows)
        results.append((rows, gradient))
    assert_same_rows(results[0][0], results[1][0], dtype)
    assert_near(results[0][1], results[1][1], dtype)
    assert_near(dequantize(results[1][0]), results[1][1].view(B * T, -1), torch.float8_e4m3fn)


@DTYPES
def test_squared_relu_both_ways(dtype: torch.dtype) -> None:
    h, dg = draw(5, 600, dtype=dtype), draw(5, 600, dtype=dtype, seed=1)
    g, expected_g, expected_dg = h.clone(), h.clone(), dg.clone()
    kernels.relu2_forward(g)
    kernels.reference_relu2_forward(expected_g)
    assert_near(g, expected_g, dtype)
    assert_near(g, h.float().relu().square().to(dtype), dtype)
    kernels.relu2_backward(dg, g)
    kernels.reference_relu2_backward(expected_dg, expected_g)
    assert_near(dg, expected_dg, dtype)
    assert_near(dg, (2 * h.float().relu() * draw(5, 600, dtype=dtype, seed=1).float()).to(dtype), dtype)
