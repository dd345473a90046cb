"""On a GPU: does cuBLASLt, called with its epilogues, multiply as plain PyTorch does?"""

import pytest
import torch
from torch import Tensor

from training import kernels_fp8, kernels_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def assert_near(value: Tensor, expected: Tensor) -> None:
    assert ((value.float() - expected.float()).norm() / expected.float().norm()).item() < 1e-2


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_layouts_bias_and_addition(transpose_a: bool, transpose_b: bool) -> None:
    a = draw(48, 64) if transpose_a else draw(64, 48)
    b = draw(80, 48) if transpose_b else draw(48, 80)
    bias, add = draw(80), draw(64, 80)
    ours, plain = (
        function(a, b, transpose_a, transpose_b, bias=bias, out=add.clone(), add=add)
        for function in (kernels_matmul.multiply, kernels_matmul.reference)
    )
    assert_near(ours, plain)


@pytest.mark.parametrize("epilogue", ["gelu", "dgelu"])
def test_gelu_and_its_gradient(epilogue: str) -> None:
    a, b, h = draw(64, 48), draw(48, 80), draw(64, 80)
    bias = draw(80) if epilogue == "gelu" else None
    results = []
    for function in (kernels_matmul.multiply, kernels_matmul.reference):
        aux = h.clone()
        results.append((function(a, b, bias=bias, epilogue=epilogue, aux=aux), aux))
    for ours, plain in zip(*results, strict=True):
        assert_near(ours, plain)


def test_fp8_by_rows() -> None:
    a, b = kernels_fp8.quantize(draw(64, 96)), kernels_fp8.quantize(draw(80, 96))
    ours, plain = (
        function(a.values, b.values, transpose_b=True, scales=(a.scales, b.scales))
        for function in (kernels_matmul.multiply, kernels_matmul.reference)
    )
    assert_near(ours, plain)
