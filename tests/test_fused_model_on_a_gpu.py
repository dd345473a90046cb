"""On a GPU: do the fused kernels keep the model's function, and give the same bits every time?"""

import copy
import dataclasses
import functools

import pytest
import torch

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
    tokens = torch.randint(0, 50257, (sequences, 1025), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(made: GPT2, sequences: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for parameter in made.parameters():
        parameter.grad = None
    loss = made(*batch(sequences))
    loss.backward()
    return loss.detach(), [p.grad for p in made.parameters()]


@pytest.mark.parametrize("recompute", [0, 1, 3])
def test_errors_are_those_of_plain_bf16(recompute: int) -> None:
    plain = model(768, 12)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    assert kernels.accelerate(fused, DEVICE, recompute)
    results = [gradients(made, 2) for made in (exact, plain, fused)]
    torch.testing.assert_close(results[2][0], results[0][0], rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(*batch(2)), results[2][0], rtol=1e-5, atol=0)
    for right, usual, ours in zip(*(grads for _, grads in results), strict=True):
        error, expected = (((g.float() - right).norm() / right.norm()).item() for g in (ours, usual))
        assert error < 1.5 * expected + 1e-3


def test_gelu_outside_of_the_product_changes_the_last_bits_only() -> None:
    usual, apart = model(768, 12), model(768, 12)
    assert kernels.accelerate(usual, DEVICE) and kernels.accelerate(apart, DEVICE, gelu_epilogue=False)
    (loss, right), (again, ours) = gradients(usual, 2), gradients(apart, 2)
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.02


def test_fp8_stays_near_bf16() -> None:
    plain = model(768, 12)
    fp8 = copy.deepcopy(plain)
    assert kernels.accelerate(fp8, DEVICE, fp8=True)
    (loss, right), (loss_fp8, ours) = gradients(plain, 2), gradients(fp8, 2)
    torch.testing.assert_close(loss_fp8, loss, rtol=1e-3, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.15


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("channels", "heads", "sequences"), [(1600, 25, 16), (768, 12, 64)])
def test_the_same_step_gives_the_same_bits(channels: int, heads: int, sequences: int, fp8: bool) -> None:
    made = model(channels, heads)
    assert kernels.accelerate(made, DEVICE, fp8=fp8)
    loss, first = gradients(made, sequences)
    for _ in range(9):
        again, grads = gradients(made, sequences)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


def test_without_cudnns_frontend_too() -> None:
    usual, other = model(768, 12), model(768, 12)
    assert kernels.accelerate(usual, DEVICE)
    ops = dataclasses.replace(kernels.fused(0), attention=functools.partial(Torch, deterministic=True))
    other.runner = FusedModel(other, ops)
    (loss, right), (again, ours) = gradients(usual, 4), gradients(other, 4)
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    for a, b in zip(ours, right, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.02
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(other, 4)[1], strict=True))
