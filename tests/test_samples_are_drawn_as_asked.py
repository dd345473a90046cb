"""Sampling: greedy text equals transformers', the cuts of the distribution hold, a seed repeats its text."""

from pathlib import Path

import pytest
import tiny_run
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training import sample
from training.weights import to_huggingface


def test_greedy_text_equals_transformers() -> None:
    ours = tiny_run.model(seed=5)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=256)).eval()
    theirs.load_state_dict(to_huggingface(ours.state_dict(), ours.config))
    prompt = torch.tensor([[3, 4, 5]])
    expected = theirs.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert sample.generate(ours, [3, 4, 5], 10, temperature=0) == expected[0, 3:].tolist()


def test_text_goes_on_past_the_context_and_repeats_with_its_seed() -> None:
    model = tiny_run.model()
    first = sample.generate(model, [], 40, seed=1)
    assert len(first) == 40 and first == sample.generate(model, [], 40, seed=1)
    assert first != sample.generate(model, [], 40, seed=2)


@pytest.mark.parametrize(
    ("top_k", "top_p", "possible"),
    [(0, 1.0, {0, 1, 2, 3}), (2, 1.0, {2, 3}), (0, 0.6, {2, 3}), (0, 0.5, {3}), (1, 1.0, {3})],
)
def test_only_the_likeliest_tokens_are_drawn(top_k: int, top_p: float, possible: set[int]) -> None:
    logits = torch.tensor([0.1, 0.1, 0.3, 0.5]).log()  # probabilities
    generator = torch.Generator().manual_seed(0)
    drawn = [sample.draw(logits, 1.0, top_k, top_p, generator) for _ in range(300)]
    assert set(drawn) == possible
    if len(possible) == 4:
        assert drawn.count(3) == pytest.approx(150, abs=40)


def test_a_resumed_run_s_samples_take_the_place_of_later_ones(tmp_path: Path) -> None:
    for step, text in ((10, "ten"), (20, "twenty"), (30, "thirty\n=== not a heading"), (20, "again")):
        sample.record(str(tmp_path), step, text)
    assert (tmp_path / "samples.txt").read_text() == "=== step 10 ===\nten\n=== step 20 ===\nagain\n"
