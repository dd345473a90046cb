"""Which kernels serve the model on this machine? Chosen once, logged with the reason, passed as a value.

With CUDA, bf16 weights and Triton the whole model runs through the fused kernels of `kernels_*.py`; anywhere else
the modules of `gpt2.py` and `modern.py` run as they are. Both compute the same function.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.models import Model
from training.modern import Modern

log = logging.getLogger("gpt2.kernels")


class AttentionKernel(Protocol):
    """Causal attention of one shape over packed (B, T, 3, H, D)."""

    def forward(self, qkv: Tensor) -> tuple[Tensor, Any]: ...
    def backward(self, grad: Tensor, qkv: Tensor, out: Tensor, saved: Any) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """The operations that a training step is made of; each file's docstring says what its own compute."""

    multiply: Callable[..., Tensor]
    norm_forward: Callable[..., Any]
    norm_backward: Callable[..., Tensor]
    gelu_forward: Callable[[Tensor], Tensor]
    add_column_sums: Callable[[Tensor, Tensor], None]
    add_scaled: Callable[[Tensor, Tensor, Tensor], None]
    scale_rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor, int, float | None, float], tuple[Tensor, Tensor]]
    embed: Callable[[Tensor, Tensor, Tensor], Tensor]
    add_embedding_gradients: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    attention: Callable[[int, int, int, int], AttentionKernel]
    quantize: Callable[..., Any]
    quantize_transposed: Callable[[Tensor], Any]
    gelu_fp8: Callable[[Tensor], Any]
    gelu_backward_fp8: Callable[[Tensor, Tensor, Tensor], Any]
    relu2_fp8: Callable[[Tensor], Any]
    relu2_backward_fp8: Callable[[Tensor, Tensor], Any]
    rms_forward: Callable[..., tuple[Tensor, Any, Tensor]]
    rms_backward: Callable[..., Tensor]
    rotate_forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate_backward: Callable[..., None]
    relu2_forward: Callable[[Tensor], None]
    relu2_backward: Callable[[Tensor, Tensor], None]


def accelerate(
    model: Model, device: torch.device, recompute: int = 0, fp8: bool = False, gelu_epilogue: bool = True
) -> bool:
    """Let the fused kernels run `model` where they can -> whether they do.

    Gradients are then added to each parameter's `.grad` in place, and its post-accumulate hooks are called
    when they are whole. `recompute`: 0 keeps GELU's output, 1 and 2 compute it again, 3 whole blocks. `fp8`: the
    blocks' products but those for weight gradients take fp8 (and GELU is never in their epilogue). Raises ValueError
    where that cannot be had.
    """
    reason = _obstacle(model, device) or (_fp8_obstacle(device) if fp8 else "")
    if reason and fp8:
        raise ValueError(f"fp8 was asked for, but {reason}")
    if reason:
        (log.warning if device.type == "cuda" else log.info)("plain PyTorch kernels: %s", reason)
        return False
    from training.kernels_model import FusedModel
    from training.kernels_model_fp8 import Fp8Model, Fp8Modern
    from training.kernels_model_modern import FusedModern

    ops = fused(device.index or 0)
    if isinstance(model, Modern):
        model.runner = (Fp8Modern if fp8 else FusedModern)(model, ops)
    else:
        model.runner = (Fp8Model if fp8 else FusedModel)(model, ops, recompute, gelu_epilogue)
    return True


def _obstacle(model: Model, device: torch.device) -> str:
    """Why the fused kernels cannot run this model here; "" where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if model.wte.weight.dtype != torch.bfloat16:
        return f"the weights are {model.wte.weight.dtype}, the kernels are for bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if model.config.channels % 16 or model.config.head_size % 8:
        return "the kernels want channels in multiples of 16 and heads in multiples of 8"
    if isinstance(model, Modern) and model.config.head_size & (model.config.head_size - 1):
        return f"the kernels want heads of a power of two, not of {model.config.head_size}"
    return ""


def _fp8_obstacle(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    return "" if capability == (9, 0) else f"fp8 by rows is for Hopper (9.0), and this GPU is {capability}"


@functools.cache
def fused(device: int) -> Kernels:
    """Triton for what is bound by memory, cuBLASLt for products, cuDNN for attention."""
    from training import (
        kernels_embedding,
        kernels_fp8,
        kernels_gelu,
        kernels_loss,
        kernels_matmul,
        kernels_modern,
        kernels_norm,
        kernels_reduce,
    )

    return Kernels(
        multiply=kernels_matmul.multiply,
        norm_forward=kernels_norm.forward,
        norm_backward=kernels_norm.backward,
        gelu_forward=kernels_gelu.forward,
        add_column_sums=kernels_reduce.add_column_sums,
        add_scaled=kernels_reduce.add_scaled,
        scale_rows=kernels_reduce.scale_rows,
        cross_entropy=kernels_loss.cross_entropy,
        embed=kernels_embedding.embed,
        add_embedding_gradients=kernels_embedding.add_gradients,
        attention=_attention(device),
        quantize=kernels_fp8.quantize,
        quantize_transposed=kernels_fp8.quantize_transposed,
        gelu_fp8=kernels_fp8.gelu,
        gelu_backward_fp8=kernels_fp8.gelu_backward,
        relu2_fp8=kernels_fp8.relu2,
        relu2_backward_fp8=kernels_fp8.relu2_backward,
        rms_forward=kernels_modern.norm_forward,
        rms_backward=kernels_modern.norm_backward,
        rotate_forward=kernels_modern.rotate_forward,
        rotate_backward=kernels_modern.rotate_backward,
        relu2_forward=kernels_modern.relu2_forward,
        relu2_backward=kernels_modern.relu2_backward,
    )


def _attention(device: int) -> Callable[[int, int, int, int], AttentionKernel]:
    from training import attention

    if importlib.util.find_spec("cudnn") is None:
        log.warning(
            "nvidia-cudnn-frontend is not installed: attention runs on PyTorch's flash kernel, which makes a "
            "step about 8%% slower; `pip install 'gpt2-pipeline[gpu]'` brings it"
        )
        return functools.partial(attention.Torch, deterministic=True)
    log.info("fused kernels: Triton, cuBLASLt, and cuDNN's deterministic attention")
    return functools.partial(attention.Cudnn, device=device)


def references() -> Kernels:
    """Each operation in plain PyTorch, on any device: what the fused kernels are tested against."""
    from training import (
        attention,
        kernels_embedding,
        kernels_fp8,
        kernels_gelu,
        kernels_loss,
        kernels_matmul,
        kernels_modern,
        kernels_norm,
        kernels_reduce,
    )

    return Kernels(
        multiply=kernels_matmul.reference,
        norm_forward=kernels_norm.reference_forward,
        norm_backward=kernels_norm.reference_backward,
        gelu_forward=kernels_gelu.reference_forward,
        add_column_sums=kernels_reduce.reference_add_column_sums,
        add_scaled=kernels_reduce.reference_add_scaled,
        scale_rows=kernels_reduce.reference_scale_rows,
        cross_entropy=kernels_loss.reference_cross_entropy,
        embed=kernels_embedding.reference_embed,
        add_embedding_gradients=kernels_embedding.reference_add_gradients,
        attention=attention.Torch,
        quantize=kernels_fp8.reference_quantize,
        quantize_transposed=kernels_fp8.reference_quantize_transposed,
        gelu_fp8=kernels_fp8.reference_gelu,
        gelu_backward_fp8=kernels_fp8.reference_gelu_backward,
        relu2_fp8=kernels_fp8.reference_relu2,
        relu2_backward_fp8=kernels_fp8.reference_relu2_backward,
        rms_forward=kernels_modern.reference_norm_forward,
        rms_backward=kernels_modern.reference_norm_backward,
        rotate_forward=kernels_modern.reference_rotate_forward,
        rotate_backward=kernels_modern.reference_rotate_backward,
        relu2_forward=kernels_modern.reference_relu2_forward,
        relu2_backward=kernels_modern.reference_relu2_backward,
    )
