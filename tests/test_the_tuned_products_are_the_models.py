"""Does the tuning look at the very products that a step asks for? Else its table is never read."""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fused_models  # noqa: E402

from benchmarks import tune_matmul  # noqa: E402
from training import kernels, kernels_matmul  # noqa: E402
from training.gpt2 import GPT2  # noqa: E402
from training.kernels_model import FusedModel  # noqa: E402
from training.kernels_model_modern import FusedModern  # noqa: E402
from training.model_config import ModelConfig, model_from_descriptor  # noqa: E402
from training.modern import Modern  # noqa: E402

GPT2_CONFIG = ModelConfig(layers=1, channels=32, heads=2, context=16, vocab=200)
MODERN_CONFIG = dataclasses.replace(GPT2_CONFIG, family="nanochat")


@pytest.mark.parametrize(
    ("model", "fused"), [(GPT2(GPT2_CONFIG), FusedModel), (Modern(MODERN_CONFIG), FusedModern)], ids=["gpt2", "modern"]
)
def test_a_steps_products_are_those_that_are_tuned(model: Any, fused: Any) -> None:
    asked = set()

    def multiply(a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
        asked.add(kernels_matmul.kind_of(a, b, **how).name)
        return kernels_matmul.reference(a, b, aux=aux, **how)

    fused_models.moved(model, 0.1).bfloat16()
    model.runner = fused(model, dataclasses.replace(kernels.references(), multiply=multiply))
    model(*fused_models.batch(2, 16, 200, seed=1)).backward()
    assert asked == {product.name for product in tune_matmul.products(model.config, rows=32)}


def test_a_case_is_a_model_and_its_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_matmul.case("modern:d12:64") == (model_from_descriptor("modern:d12"), 65_536)
    assert tune_matmul.case("d48:16") == (model_from_descriptor("d48"), 16_384)
    assert tune_matmul.main(["modern:d12"]) == 2
    assert "such as d12:64 or modern:d12:64" in capsys.readouterr().err
