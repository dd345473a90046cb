"""What tests of fused models share: weights off their start, random batches, gradients, interpreted kernels."""

import copy
import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from training import kernels
from training.models import Model

M = TypeVar("M", bound=Model)


def moved(made: M, scale: float) -> M:
    """Its initial weights plus noise, so that none is zero."""
    made.init_weights(seed=1)
    with torch.no_grad():
        for i, weight in enumerate(made.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) * scale)
    return made


def batch(sequences: int, length: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens and the ones that follow them."""
    tokens = torch.randint(0, vocab, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(made: Model, tokens: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss of one batch, and each parameter's gradient."""
    for parameter in made.parameters():
        parameter.grad = None
    loss = made(tokens, targets)
    loss.backward()
    return loss.detach(), [p.grad for p in made.parameters()]


def assert_as_near_as_plain(plain: Model, fused: Model, tokens: Tensor, targets: Tensor, loss_rtol: float) -> None:
    """Against the same weights in fp32 the fused bf16 model errs no more than the plain one."""
    exact = copy.deepcopy(plain).float()
    results = [gradients(made, tokens, targets) for made in (exact, plain, fused)]
    torch.testing.assert_close(results[2][0], results[0][0], rtol=loss_rtol, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens, targets), results[2][0], rtol=1e-5, atol=0)
    for right, usual, ours in zip(*(grads for _, grads in results), strict=True):
        error, expected = (((g.float() - right).norm() / right.norm()).item() for g in (ours, usual))
        assert error < 1.5 * expected + 1e-3


def interpreted() -> kernels.Kernels:
    """The Triton kernels, with the products and the attention that need a GPU in plain PyTorch."""
    plain = kernels.references()
    return dataclasses.replace(kernels.fused(0), multiply=plain.multiply, attention=plain.attention)
