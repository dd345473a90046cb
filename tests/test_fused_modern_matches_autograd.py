"""Does the speed recipe's model run by hand give what autograd gives? With plain and with Triton kernels."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

import fused_models  # noqa: E402
from fused_models import interpreted, moved  # noqa: E402

from training import kernels  # noqa: E402
from training.config import ModelConfig  # noqa: E402
from training.kernels_model_modern import FusedModern  # noqa: E402
from training.modern import Modern  # noqa: E402

CONFIG = ModelConfig(layers=2, channels=32, heads=2, context=16, vocab=200)


def model() -> Modern:
    return moved(Modern(CONFIG), 0.1)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_models.batch(2, 16, CONFIG.vocab, seed)


@pytest.mark.parametrize("which", ["plain", "triton"])
def test_loss_and_accumulated_gradients(which: str) -> None:
    expected, ours = model(), model()
    ours.runner = FusedModern(ours, kernels.references() if which == "plain" else interpreted())
    for seed in (1, 2):
        losses = [(m(*batch(seed)) * 0.5) for m in (expected, ours)]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
        for loss in losses:
            loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(*batch(1)), expected(*batch(1)))
    for (name, weight), other in zip(expected.named_parameters(), ours.parameters(), strict=True):
        error = (other.grad - weight.grad).norm() / weight.grad.norm()
        assert error < 1e-5, (name, error)
