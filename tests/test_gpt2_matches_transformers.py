"""Is the model GPT-2's? Logits, loss and gradients against transformers' GPT2LMHeadModel."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from training.gpt2 import GPT2
from training.model_config import ModelConfig, model_from_descriptor

CONFIG = ModelConfig(layers=2, channels=48, heads=3, context=32, vocab=300)
LINEARS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def pair(config: ModelConfig = CONFIG, spread: float = 0.1) -> tuple[GPT2, GPT2LMHeadModel]:
    """Our model and theirs with the same weights, spread wide enough that every term of the function counts."""
    ours = GPT2(config)
    ours.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.empty(weight.shape).normal_(0, spread, generator=generator))
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab, n_positions=config.context, n_embd=config.channels, n_layer=config.layers,
            n_head=config.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    weights = ours.state_dict()
    theirs.load_state_dict({theirs_name(n): as_theirs(n, w, config.vocab) for n, w in weights.items()}, False)
    return ours, theirs


def theirs_name(name: str) -> str:
    return "transformer." + name.replace("blocks.", "h.")


def as_theirs(name: str, weight: Tensor, vocab: int = CONFIG.vocab) -> Tensor:
    if name == "wte.weight":
        return weight[:vocab]
    return weight.t() if name.endswith(LINEARS) else weight


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, CONFIG.vocab, (3, 33), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def test_logits_and_loss() -> None:
    ours, theirs = pair()
    tokens, targets = batch()
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours.logits(tokens), expected, atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours(tokens, targets), loss, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, targets), loss, atol=1e-5, rtol=0)


def test_gradients_of_every_weight() -> None:
    ours, theirs = pair()
    tokens, targets = batch()
    ours(tokens, targets).backward()
    torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: w.grad for name, w in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        expected = gradients[theirs_name(name)]
        assert relative_error(as_theirs(name, weight.grad), expected) < 1e-4, name
    assert not ours.wte.weight.grad[CONFIG.vocab :].any()


@pytest.mark.slow
def test_the_124m_model_too() -> None:
    config = model_from_descriptor("d12")
    ours, theirs = pair(config, spread=0.02)
    tokens = torch.randint(0, config.vocab, (1, 65), generator=torch.Generator().manual_seed(3))
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), expected, atol=1e-4, rtol=0)
    found = ours(tokens, targets)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=0)
    found.backward()
    loss.backward()
    gradients = {name: w.grad for name, w in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        error = relative_error(as_theirs(name, weight.grad, config.vocab), gradients[theirs_name(name)])
        assert error < 1e-4, name


def test_bf16_stays_near_fp32() -> None:
    ours, _ = pair()
    tokens, targets = batch()
    loss = ours(tokens, targets)
    low = ours.bfloat16()(tokens, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss, rtol=2e-2, atol=0)
    low.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in ours.parameters())


def test_same_seed_same_weights_and_llmc_statistics() -> None:
    first, second, other = (GPT2(ModelConfig(layers=2, channels=128, heads=2)) for _ in range(3))
    first.init_weights(7)
    second.init_weights(7)
    other.init_weights(8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.wpe.weight, other.wpe.weight)
    assert first.blocks[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.blocks[0].mlp.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert first.wpe.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens"):
        GPT2(CONFIG).logits(torch.zeros(1, 33, dtype=torch.int64))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()
