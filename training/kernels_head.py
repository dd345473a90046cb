"""What is the head's loss, without ever holding the logits of a batch?

The head's output is 50,304 wide: the logits of 16 x 1,024 tokens would take 1.6 GB in bf16. So the loss runs over
chunks of tokens, and its gradients are taken in the same pass, while a chunk's probabilities are at hand.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 * 1024**2  # of logits: small enough for a CPU's cache, large enough for an even matmul


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Mean cross-entropy of the tied head, as an fp32 scalar.

    x: (N, C), weight: (Vp, C), targets: (N,) int64. Rows of `weight` from `vocab` on are padding: they get
    no probability and no gradient.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _HeadLoss.apply(x, weight, targets, vocab)  # type: ignore[no-any-return]
    total = sum(_losses(x[rows], weight[:vocab], targets[rows])[0].sum() for rows in chunks(len(x), vocab))
    return torch.as_tensor(total / len(x))


def chunks(tokens: int, vocab: int) -> list[slice]:
    """Even slices over the tokens, each with at most CHUNK_BYTES of fp32 logits."""
    size = max(16, CHUNK_BYTES // (4 * vocab))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _losses(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk: the losses (N,), exp(logits - max) (N, V) and their row sums (N, 1), all fp32."""
    logits = (x @ weight.t()).float()
    target_logits = logits.gather(1, targets[:, None])
    peak = logits.amax(1, keepdim=True)
    exps = logits.sub_(peak).exp_()
    sums = exps.sum(1, keepdim=True)
    return (sums.log() + peak - target_logits).squeeze(1), exps, sums


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        real = weight[:vocab]
        for rows in chunks(len(x), vocab):
            losses, exps, sums = _losses(x[rows], real, targets[rows])
            total += losses.sum()
            # The gradient of the logits is exps / sums minus one at the target. The division is left to the
            # narrow side of both products, which spares two passes over the wide one.
            exps.scatter_add_(1, targets[rows, None], -sums)
            wide = exps.to(x.dtype)
            grad_x[rows] = ((wide @ real).float() / (sums * len(x))).to(x.dtype)
            _add_product(grad_weight[:vocab], wide.t(), (x[rows].float() / (sums * len(x))).to(x.dtype))
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return total / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x.mul_(grad), grad_weight.mul_(grad).to(ctx.dtype), None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
