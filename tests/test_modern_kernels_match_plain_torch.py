"""Do the Triton kernels of the speed recipe's model compute what plain PyTorch and autograd do?"""

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from training import kernels_modern as kernels  # noqa: E402
from training.modern import norm, rotate, rotations  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


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
