"""Does the model run by hand give what autograd gives? Loss and every gradient, with plain and Triton kernels."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

import fused_models  # noqa: E402
from fused_models import interpreted, moved  # noqa: E402

from training import kernels  # noqa: E402
from training.config import ModelConfig  # noqa: E402
from training.gpt2 import GPT2  # noqa: E402
from training.kernels_model import FusedModel  # noqa: E402

CONFIG = ModelConfig(layers=2, channels=32, heads=2, context=16, vocab=200)


def model() -> GPT2:
    return moved(GPT2(CONFIG), 0.1)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_models.batch(2, 16, CONFIG.vocab, seed)


@pytest.mark.parametrize(
    ("which", "recompute", "gelu_epilogue"),
    [("plain", 0, True), ("plain", 1, True), ("plain", 3, True), ("plain", 0, False), ("triton", 0, True)],
)
def test_loss_and_accumulated_gradients(which: str, recompute: int, gelu_epilogue: bool) -> None:
    expected, ours = model(), model()
    ops = kernels.references() if which == "plain" else interpreted()
    ours.runner = FusedModel(ours, ops, recompute, gelu_epilogue)
    for seed in (1, 2):
        losses = [(m(*batch(seed)) * 0.5) for m in (expected, ours)]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
        for loss in losses:
            loss.backward()
    for (name, weight), other in zip(expected.named_parameters(), ours.parameters(), strict=True):
        error = (other.grad - weight.grad).norm() / weight.grad.norm()
        assert error < 1e-5, name


def test_without_gradients_and_hooks() -> None:
    expected, ours = model(), model()
    ours.runner = FusedModel(ours, kernels.references())
    with torch.no_grad():
        torch.testing.assert_close(ours(*batch(1)), expected(*batch(1)))
    arrived = []
    for name, parameter in ours.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    ours(*batch(1)).backward()
    assert sorted(arrived) == sorted(name for name, _ in ours.named_parameters())
    assert arrived[0].startswith("blocks.1.") and arrived[-1] == "ln_f.bias"


def test_on_a_cpu_the_modules_run_as_they_are() -> None:
    made = model()
    assert not kernels.accelerate(made, torch.device("cpu"))
    assert made.runner is None
