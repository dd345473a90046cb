"""How good is the model while it trains? Validation loss and HellaSwag's accuracy, on every rank's share.

Shapes are the same each time, so that nothing compiles anew; the result is the same for any number of ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.shards import Choice
from training.distributed import World
from training.loader import Loader
from training.models import Model

ITEMS = 4  # multiple-choice items scored at once: 16 rows


@torch.no_grad()
def mean_loss(model: Model, load: Loader, sequences: int, micro_batch: int, world: World) -> float:
    """Over the split's first `sequences` sequences, or all of it where it holds fewer."""
    count = min(sequences, load.order.sequences_per_epoch)
    mine = range(world.rank, count, world.size)
    total = torch.zeros((), device=world.device)
    for at in range(0, len(mine), micro_batch):
        positions = mine[at : at + micro_batch]
        total += model(*load(positions)) * len(positions)
    return world.sums([total])[0] / count


@torch.no_grad()
def choice_accuracy(model: Model, items: Sequence[Choice], world: World) -> float:
    """Share of items whose right ending has the lowest mean loss a token: llm.c's `eval:` figure."""
    longest = max(len(item.context) + max(map(len, item.endings)) for item in items)
    width = min(-(-longest // 64) * 64, model.config.context)
    mine = items[world.rank :: world.size]
    right = 0
    for at in range(0, len(mine), ITEMS):
        group = mine[at : at + ITEMS]
        chosen = _ending_losses(model, group, width, world.device).argmin(1).tolist()
        right += sum(choice == item.label for choice, item in zip(chosen, group, strict=True))
    return world.sums([right])[0] / len(items)


def _ending_losses(model: Model, items: Sequence[Choice], width: int, device: torch.device) -> Tensor:
    """Mean loss of each ending's tokens (items, 4); contexts too long lose their start."""
    tokens = torch.zeros(ITEMS * 4, width, dtype=torch.int64)
    counted = torch.zeros(ITEMS * 4, width - 1)
    rows = [(item.context, ending) for item in items for ending in item.endings]
    for row, (context, ending) in enumerate(rows):
        text = (*context, *ending)[-width:]
        tokens[row, : len(text)] = torch.tensor(text)
        counted[row, len(text) - len(ending) - 1 : len(text) - 1] = 1.0
    tokens, counted = tokens.to(device), counted.to(device)
    losses = torch.stack([_token_losses(model, row) for row in tokens.split(4)]).view(ITEMS * 4, width - 1)
    means = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
    return means.view(ITEMS, 4)[: len(items)]


def _token_losses(model: Model, tokens: Tensor) -> Tensor:
    """(B, T) -> the loss of each token after the first, (B, T - 1) fp32."""
    logits = model.logits(tokens)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
