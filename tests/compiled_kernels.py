"""Compiles the Triton kernels for a Hopper GPU, which need not be there, as models and optimizers call them.

Nothing is launched, so the numbers mean nothing. Prints the name of each kernel that was compiled.
"""

from typing import Any

import torch
from fused_models import batch, gradients, interpreted, moved
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from training import kernels_adamw, kernels_loss, kernels_muon
from training.gpt2 import GPT2
from training.kernels_model import FusedModel
from training.kernels_model_fp8 import Fp8Model, Fp8Modern
from training.kernels_model_modern import FusedModern
from training.model_config import ModelConfig
from training.modern import Modern

VOCAB, LENGTH = 200, 16
SIZES = {"layers": 2, "channels": 128, "heads": 2, "context": LENGTH, "vocab": VOCAB}


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


launch = JITFunction.run


def compile_only(self: Any, *words: Any, grid: Any, warmup: bool, **named: Any) -> None:
    launch(self, *words, grid=grid, warmup=True, **named)
    print(self.fn.__name__)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    ops = interpreted()
    for model in (GPT2(ModelConfig(**SIZES)), Modern(ModelConfig(**SIZES, family="nanochat"))):
        made = moved(model, 0.02).bfloat16()
        gpt2 = [FusedModel(made, ops, recompute=level) for level in (0, 3)] + [Fp8Model(made, ops)]
        for runner in gpt2 if isinstance(made, GPT2) else [FusedModern(made, ops), Fp8Modern(made, ops)]:
            made.runner = runner
            gradients(made, *batch(2, LENGTH, VOCAB, seed=1))
    logits, row = torch.zeros(2, VOCAB, dtype=torch.bfloat16), torch.zeros(2)
    for capped in (False, True):  # as for logits on a GPU
        kernels_loss._cross_entropy[(2,)](
            logits, row.long(), row, row, VOCAB, VOCAB, 1.0, 15.0, BLOCK=kernels_loss.BLOCK, GRADIENT=True,
            CAPPED=capped, FAST=True, num_warps=kernels_loss.WARPS,
        )  # fmt: skip
    for weights in (row, row.bfloat16()):
        kernels_adamw.update(weights, weights, row, row, row, 1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
        kernels_muon.accumulate(weights, row, weights, 0.95, 1.0)
        kernels_muon.apply(weights, row, weights, 0.02, 0.1)


if __name__ == "__main__":
    main()
