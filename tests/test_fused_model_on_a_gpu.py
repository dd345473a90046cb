"""On a GPU: do the fused kernels keep the model's function, and give the same bits every time?"""

import copy
import dataclasses
import functools

import fused_models
import pytest
import torch
from fused_models import assert_as_near_as_plain, gradients

from training import kernels
from training.attention import Torch
from training.gpt2 import GPT2
from training.kernels_model import FusedModel
from training.model_config import ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = torch.device("cuda", 0)


def model(channels: int, heads: int) -> GPT2:
    made = GPT2(ModelConfig(layers=2, channels=channels, heads=heads))
    made.init_weights(seed=1)
    return made.to(DEVICE, torch.bfloat16)


def batch(sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = fused_models.batch(sequences, 1024, 50257, seed=3)
    return tokens.to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize("recompute", [0, 1, 3])
def test_errors_are_those_of_plain_bf16(recompute: int) -> None:
    plain = model(768, 12)
    fused = copy.deepcopy(plain)
    assert kernels.accelerate(fused, DEVICE, recompute)
    assert_as_near_as_plain(plain, fused, *batch(2), loss_rtol=1e-4)


def test_gelu_outside_of_the_product_changes_the_last_bits_only() -> None:
    usual, apart = model(768, 12), model(768, 12)
    assert kernels.accelerate(usual, DEVICE) and kernels.accelerate(apart, DEVICE, gelu_epilogue=False)
    (loss, right), (again, ours) = gradients(usual, *batch(2)), gradients(apart, *batch(2))
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.02


def test_fp8_stays_near_bf16() -> None:
    plain = model(768, 12)
    fp8 = copy.deepcopy(plain)
    assert kernels.accelerate(fp8, DEVICE, fp8=True)
    (loss, right), (loss_fp8, ours) = gradients(plain, *batch(2)), gradients(fp8, *batch(2))
    torch.testing.assert_close(loss_fp8, loss, rtol=1e-3, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.15


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("channels", "heads", "sequences"), [(1600, 25, 16), (768, 12, 64)])
def test_the_same_step_gives_the_same_bits(channels: int, heads: int, sequences: int, fp8: bool) -> None:
    made = model(channels, heads)
    assert kernels.accelerate(made, DEVICE, fp8=fp8)
    loss, first = gradients(made, *batch(sequences))
    for _ in range(9):
        again, grads = gradients(made, *batch(sequences))
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


def test_without_cudnns_frontend_too() -> None:
    usual, other = model(768, 12), model(768, 12)
    assert kernels.accelerate(usual, DEVICE)
    ops = dataclasses.replace(kernels.fused(0), attention=functools.partial(Torch, deterministic=True))
    other.runner = FusedModel(other, ops)
    (loss, right), (again, ours) = gradients(usual, *batch(4)), gradients(other, *batch(4))
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.02
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(other, *batch(4))[1], strict=True))
