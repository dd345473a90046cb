"""Do the Triton kernels compute what plain PyTorch does? On the CPU through Triton's interpreter."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from training import (  # noqa: E402
    kernels_adamw,
    kernels_embedding,
    kernels_gelu,
    kernels_loss,
    kernels_norm,
    kernels_reduce,
    optim,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(DEVICE, dtype)


def assert_near(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((value.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < TOLERANCE[dtype], error


@DTYPES
@pytest.mark.parametrize("with_branch", [True, False])
def test_layernorm_of_the_stream_with_its_branch(dtype: torch.dtype, with_branch: bool) -> None:
    x, weight, bias = draw(7, 48, dtype=dtype, shift=0.5), draw(48, dtype=dtype, seed=1), draw(48, dtype=dtype)
    results = []
    for function in (kernels_norm.forward, kernels_norm.reference_forward):
        branch = draw(7, 48, dtype=dtype, seed=3) if with_branch else None
        results.append(function(x, branch, weight, bias))
        assert results[-1].x is (x if branch is None else branch)
    for value, expected in zip(*results, strict=True):
        assert_near(value, expected, dtype)


@DTYPES
@pytest.mark.parametrize("with_stream", [True, False])
def test_layernorm_backward_with_all_its_sums(dtype: torch.dtype, with_stream: bool) -> None:
    x, weight, bias = draw(9, 48, dtype=dtype), draw(48, dtype=dtype, seed=1), draw(48, dtype=dtype, seed=2)
    results = []
    for function in (kernels_norm.backward, kernels_norm.reference_backward):
        dy = draw(9, 48, dtype=dtype, seed=3)
        stream = draw(9, 48, dtype=dtype, seed=4) if with_stream else None
        grads = tuple(draw(48, dtype=dtype, seed=5 + i) for i in range(3))
        mean, rstd = kernels_norm.forward(x, None, weight, bias)[2:]
        out = function(dy, x, weight, bias, mean, rstd, stream, grads)
        assert stream is None or out is stream
        results.append((out, dy, *grads))
    for value, expected in zip(*results, strict=True):
        assert_near(value, expected, dtype)


@DTYPES
def test_gelu(dtype: torch.dtype) -> None:
    h = draw(40, 300, dtype=dtype, scale=2.0)
    assert_near(kernels_gelu.forward(h), kernels_gelu.reference_forward(h), dtype)


@DTYPES
def test_column_sums_are_added(dtype: torch.dtype) -> None:
    x, out, expected = draw(200, 3, 130, dtype=dtype)[:, ::2], *(draw(3, 130, dtype=dtype, seed=1) for _ in range(2))
    kernels_reduce.add_column_sums(x, out[::2])
    kernels_reduce.reference_add_column_sums(x, expected[::2])
    assert_near(out, expected, dtype)


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, scale: float | None, cap: float) -> None:
    targets = torch.tensor([0, 5, 4999, 17], device=DEVICE)
    value = draw(4, 5120, dtype=dtype, scale=3.0)
    # Training in bf16, the card's own tanh is near enough.
    compare_cross_entropy(value, targets, 5000, scale, dtype, dtype if cap and scale else torch.float32, cap)
    assert scale is None or not value[:, 5000:].any()


@DTYPES
@pytest.mark.parametrize("scale", [None, 1.0])
def test_cross_entropy_of_logits_far_above_the_target(dtype: torch.dtype, scale: float | None) -> None:
    value = draw(3, 512, dtype=dtype) * 30
    value[:, 7], value[2, 300] = 500.0, 499.0
    # An exponent above 85 is kept in the logits' own type: half a unit of bf16's last place at 500 is 1.
    compare_cross_entropy(value, torch.tensor([3, 7, 300], device=DEVICE), 500, scale, dtype, dtype)


def compare_cross_entropy(
    value: Tensor,
    targets: Tensor,
    vocab: int,
    scale: float | None,
    dtype: torch.dtype,
    of_losses: torch.dtype,
    cap: float = 0.0,
) -> None:
    expected = value.clone()
    losses, factors = kernels_loss.cross_entropy(value, targets, vocab, scale, cap)
    expected_losses, expected_factors = kernels_loss.reference_cross_entropy(expected, targets, vocab, scale, cap)
    assert_near(losses, expected_losses, of_losses)
    if scale is None:
        assert torch.equal(value, expected)
    else:
        assert_near(value.float() * factors[:, None], expected.float() * expected_factors[:, None], dtype)


@DTYPES
def test_embedding_and_its_gradients_with_repeated_tokens(dtype: torch.dtype) -> None:
    tokens = torch.tensor([[3, 3, 0, 19] * 8, [3, 1, 2, 19] * 8], device=DEVICE)
    wte, wpe = draw(20, 40, dtype=dtype), draw(32, 40, dtype=dtype, seed=1)
    x = kernels_embedding.embed(tokens, wte, wpe)
    assert_near(x, kernels_embedding.reference_embed(tokens, wte, wpe), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 32), (5, 7), (1, 1), (2, 150)])
@pytest.mark.parametrize("different", [1, 3, 40])
def test_gradients_of_rare_and_frequent_tokens(dtype: torch.dtype, shape: tuple[int, int], different: int) -> None:
    batch, length = shape
    tokens = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 3 * different).long().to(DEVICE)
    dx = draw(batch * length, 40, dtype=dtype, seed=2)
    results = []
    for function in (kernels_embedding.add_gradients, kernels_embedding.reference_add_gradients):
        grads = draw(40, 40, dtype=dtype, seed=3), draw(length, 40, dtype=dtype, seed=4)
        function(dx, tokens, *grads)
        results.append(grads)
    for value, expected in zip(*results, strict=True):
        assert_near(value, expected, dtype)


@DTYPES
@pytest.mark.parametrize("function", [kernels_adamw.update, optim.torch_update])
def test_adamw_is_torchs(dtype: torch.dtype, function: Callable[..., None]) -> None:
    master = draw(3000, dtype=torch.float32)
    state = [torch.zeros(3000, device=DEVICE) for _ in range(2)]
    expected = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    weights = master.to(dtype) if dtype == torch.bfloat16 else master
    for step in range(1, 4):
        gradient = draw(3000, dtype=dtype, seed=step)
        expected.grad = gradient.float() * 0.25
        optimizer.step()
        function(weights, gradient, *state, master, step, 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.25)
    assert_near(master, expected, torch.float32)
    assert_near(weights, master, dtype)


@DTYPES
def test_a_scaled_tensor_is_added(dtype: torch.dtype) -> None:
    scale = torch.tensor(1 / 3, device=DEVICE)
    value, expected = (draw(3000, dtype=dtype) for _ in range(2))
    kernels_reduce.add_scaled(value, draw(3000, dtype=dtype, seed=1), scale)
    kernels_reduce.reference_add_scaled(expected, draw(3000, dtype=dtype, seed=1), scale)
    assert_near(value, expected, dtype)


@DTYPES
def test_rows_are_scaled_in_place(dtype: torch.dtype) -> None:
    value, expected = (draw(30, 100, dtype=dtype) for _ in range(2))
    factors = draw(30, dtype=torch.float32, seed=1)
    kernels_reduce.scale_rows(value, factors, value)
    kernels_reduce.reference_scale_rows(expected, factors, expected)
    assert_near(value, expected, dtype)
