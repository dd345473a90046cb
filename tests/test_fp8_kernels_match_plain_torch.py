"""Do the kernels that write fp8 round as plain PyTorch does, row by row?"""

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from training import kernels_fp8  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts off where a GPU rounds to the nearest, and loses a bit of subnormal numbers.
TIE, PRECISION = (0.02, 0.04) if DEVICE == "cuda" else (0.15, 0.15)


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, rows)[:, None] * (torch.arange(rows) != 2)[:, None]
    return (torch.randn(rows, columns, generator=generator) * sizes).to(DEVICE, torch.bfloat16)


def assert_same(rows: kernels_fp8.Rows, expected: kernels_fp8.Rows) -> None:
    torch.testing.assert_close(rows.scales, expected.scales, rtol=1e-6, atol=0)
    value, meant = kernels_fp8.dequantize(rows), kernels_fp8.dequantize(expected)
    for row, right in zip(value, meant, strict=True):
        assert (row - right).norm() <= TIE * right.norm()  # a tie may round either way


def test_rows_and_their_sums() -> None:
    x = draw(9, 80)
    grads = [torch.ones(80, device=DEVICE) for _ in range(2)]
    assert_same(kernels_fp8.quantize(x), kernels_fp8.reference_quantize(x))
    assert_same(kernels_fp8.quantize(x, grads[0]), kernels_fp8.reference_quantize(x, grads[1]))
    torch.testing.assert_close(*grads)


def test_fp8_stays_within_its_precision() -> None:
    x = draw(9, 80)
    error = (kernels_fp8.dequantize(kernels_fp8.quantize(x)) - x.float()).norm(dim=1)
    assert (error <= PRECISION * x.float().norm(dim=1)).all()


def test_transposed_weights() -> None:
    w = draw(70, 40)
    assert_same(kernels_fp8.quantize_transposed(w), kernels_fp8.reference_quantize_transposed(w))


def test_squared_relu_forward_and_backward() -> None:
    h, given, results = draw(9, 80), draw(9, 80, seed=2).abs(), []
    for forward, backward in (
        (kernels_fp8.relu2, kernels_fp8.relu2_backward),
        (kernels_fp8.reference_relu2, kernels_fp8.reference_relu2_backward),
    ):
        g, dg = h.clone(), draw(9, 80, seed=1)
        results.append((forward(g), backward(dg, given), g, dg))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    for value, expected in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(results[0][2], h.float().relu().square().bfloat16(), rtol=2e-2, atol=1e-6)


def test_gelu_forward_and_backward() -> None:
    h = draw(9, 80)
    assert_same(kernels_fp8.gelu(h), kernels_fp8.reference_gelu(h))
    results = []
    for function in (kernels_fp8.gelu_backward, kernels_fp8.reference_gelu_backward):
        dg, hidden, bias_grad = draw(9, 80, seed=1), h.clone(), torch.ones(80, device=DEVICE)
        results.append((function(dg, hidden, bias_grad), dg, hidden, bias_grad))
    assert_same(results[0][0], results[1][0])
    for value, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-6)
