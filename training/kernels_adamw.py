"""How does AdamW update a flat buffer in one pass, with the clipping of the gradient in it?

28 bytes a parameter move for bf16 weights with fp32 masters: the least there is. Follows torch.optim.AdamW.
"""

# The arguments of Triton's functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _update(
    weights, gradients, exp_avg, exp_avg_sq, masters, size, scale, lr, beta1, beta2, eps, decay, step_size,
    root_correction, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gradient = tl.load(gradients + place, inside, 0.0).to(tl.float32) * scale
    first = tl.load(exp_avg + place, inside, 0.0)
    second = tl.load(exp_avg_sq + place, inside, 0.0)
    value = tl.load(masters + place, inside, 0.0)
    first += (gradient - first) * (1.0 - beta1)
    second = second * beta2 + gradient * gradient * (1.0 - beta2)
    value -= lr * decay * value
    value -= step_size * first / (tl.sqrt(second) / root_correction + eps)
    tl.store(exp_avg + place, first, inside)
    tl.store(exp_avg_sq + place, second, inside)
    tl.store(masters + place, value, inside)
    tl.store(weights + place, value.to(weights.dtype.element_ty), inside)


def update(
    weights: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    masters: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: float,
) -> None:
    """Update number `step` (the first is 1) of flat tensors, with the gradients times `scale`.

    exp_avg, exp_avg_sq and masters are fp32; weights, which may be the masters, get these rounded.
    """
    size = weights.numel()
    step_size, root_correction = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    _update[(triton.cdiv(size, BLOCK),)](
        weights, gradients, exp_avg, exp_avg_sq, masters, size, scale, lr, *betas, eps, decay, step_size,
        root_correction, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
