"""Each level of recompute gives the same loss and gradients, and keeps less."""

import pytest
import tiny_run
import torch

from training import recompute
from training.gpt2 import GPT2

TOKENS = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(level: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """With the bytes that autograd keeps between the two passes, each storage once."""
    model = tiny_run.model()
    recompute.apply(model, level)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, sum(size for at, size in kept.items() if at not in weights)  # type: ignore[return-value]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_loss_and_gradients_are_the_same_to_the_bit(level: int) -> None:
    loss, gradients, _ = loss_and_gradients(level)
    expected_loss, expected, _ = loss_and_gradients(0)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def test_each_level_keeps_less_than_the_one_before() -> None:
    kept = [loss_and_gradients(level)[2] for level in range(4)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_level_0_leaves_the_model_as_it_is() -> None:
    model = tiny_run.model()
    recompute.apply(model, 0)
    assert isinstance(model, GPT2) and "forward" not in vars(model.blocks[0])
