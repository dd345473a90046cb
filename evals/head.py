"""How do hidden states become log-probabilities of wanted tokens? The head's matrix; its logits, piece by piece."""

from collections.abc import Iterable

import torch
from torch import Tensor

from evals.model import LoadedModel


@torch.inference_mode()
def linear_head(model: LoadedModel) -> torch.nn.Linear | None:
    """The output matrix, if the logits are its product with the last hidden states, softly capped or as they are.

    Some architectures do more to their logits; those go through the whole model.
    """
    head = model.module.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.module.base_model is model.module:
        return None
    probe = torch.tensor([[model.eot, 0, 1, 2]], device=model.device)
    states = model.module.base_model(probe, use_cache=False).last_hidden_state
    logits = model.module(probe, use_cache=False).logits
    return head if torch.allclose(capped(head(states), soft_cap(model)).float(), logits.float(), atol=1e-4) else None


def soft_cap(model: LoadedModel) -> float | None:
    """The bound that Gemma 2 and nanochat set on their logits. Small logits hardly show it, so no probe would."""
    return getattr(model.module.config.get_text_config(), "final_logit_softcapping", None)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """In place."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 logits (n, v) whatever the weights' type: GPT-2's lie near -100, where bf16 has steps of 0.5."""
    if rows.dtype == torch.float32:
        return torch.nn.functional.linear(rows, weight, bias)
    exact = torch.mm(rows, weight.t(), out_dtype=torch.float32) if rows.is_cuda else rows.float() @ weight.float().t()
    return exact if bias is None else exact + bias


def reduce_in_cache(pieces: Iterable[Tensor], count: int, owners: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of each wanted token (n,) in its position's logits, which come in pieces of the vocabulary.

    For a CPU, and pieces that stay in its cache.
    """
    top = torch.full((count, 1), -torch.inf, device=wanted.device)
    total = torch.zeros_like(top, dtype=torch.float64)
    chosen = torch.full(wanted.shape, -torch.inf, device=wanted.device)
    start = 0
    for logits in pieces:  # (m, v)
        chosen = _pick(logits, start, owners, wanted, chosen)
        highest = torch.maximum(top, logits.amax(-1, keepdim=True))
        # in place: a second tensor of this size costs more than the exp itself
        sums = logits.sub_(highest).exp_().sum(-1, keepdim=True)
        total = total * (top - highest).double().exp() + sums
        top, start = highest, start + logits.shape[-1]
    top, total = top.squeeze(-1)[owners], total.squeeze(-1)[owners]
    return chosen.double() - top.double() - total.log(), chosen == top


def reduce_by_rows(pieces: Iterable[Tensor], count: int, owners: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a GPU, and pieces that do not: they are walked over half as often."""
    top = torch.full((count,), -torch.inf, device=wanted.device)
    total = torch.full_like(top, -torch.inf, dtype=torch.float64)  # log of the sum of exp
    chosen = torch.full(wanted.shape, -torch.inf, device=wanted.device)
    start = 0
    for logits in pieces:  # (m, v)
        chosen = _pick(logits, start, owners, wanted, chosen)
        highest, where = logits.max(-1)
        # the difference of the two is that log; both are exact, or small where they are rounded
        below = logits.log_softmax(-1).gather(-1, where[:, None]).squeeze(-1)
        total = torch.logaddexp(total, highest.double() - below.double())
        top, start = torch.maximum(top, highest), start + logits.shape[-1]
    return chosen.double() - total[owners], chosen == top[owners]


def _pick(logits: Tensor, start: int, owners: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """`chosen`, with the logits of the wanted tokens that lie in this piece, which begins with token `start`."""
    width = logits.shape[-1]
    inside = (wanted >= start) & (wanted < start + width)
    return torch.where(inside, logits[owners, (wanted - start).clamp(0, width - 1)], chosen)
