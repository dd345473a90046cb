"""Sampling: greedy text equals transformers', the cuts of the distribution hold, a seed repeats its text."""

import re
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_pipeline import Finished
from transformers import GPT2Config, GPT2LMHeadModel

from storage import records, tokenizer
from training import sample
from training.config import SAMPLES, UNICORN
from training.gpt2 import GPT2
from training.model_config import ModelConfig
from training.weights import to_huggingface


def test_greedy_text_equals_transformers() -> None:
    ours = tiny_run.model(seed=5)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=256)).eval()
    theirs.load_state_dict(to_huggingface(ours.state_dict(), ours.config))
    prompt = torch.tensor([[3, 4, 5]])
    expected = theirs.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert sample.generate(ours, [3, 4, 5], 10, temperature=0) == expected[0, 3:].tolist()


def test_remembered_keys_and_values_give_the_logits_of_the_whole_text() -> None:
    """Also where the text passes the context of 16, and its window moves."""
    model = tiny_run.model(seed=3)
    cache, text = sample.Cache(model), torch.tensor([[3, 4, 5], [9, 8, 7]])
    for step in range(20):
        with torch.no_grad():
            expected = model.logits(text[:, -16:])[:, -1]
            assert torch.allclose(cache.next_logits(text), expected, atol=1e-5), step
        text = torch.cat([text, torch.tensor([[step], [2 * step]])], dim=1)


def test_text_goes_on_past_the_context_and_repeats_with_its_seed() -> None:
    model = tiny_run.model()
    first = sample.generate(model, [], 40, seed=1)
    assert len(first) == 40 and first == sample.generate(model, [], 40, seed=1)
    assert first != sample.generate(model, [], 40, seed=2)


@pytest.mark.parametrize(
    ("top_k", "top_p", "possible"),
    [(0, 1.0, {0, 1, 2, 3}), (2, 1.0, {2, 3}), (0, 0.6, {2, 3}), (0, 0.4, {3}), (1, 1.0, {3})],
)
def test_only_the_likeliest_tokens_are_drawn(top_k: int, top_p: float, possible: set[int]) -> None:
    logits = torch.tensor([0.1, 0.1, 0.3, 0.5]).log()  # probabilities
    generator = torch.Generator().manual_seed(0)
    drawn = sample.draw(logits.expand(300, 4), 1.0, top_k, top_p, generator)
    assert set(drawn) == possible
    if len(possible) == 4:
        assert drawn.count(3) == pytest.approx(150, abs=40)


def test_a_text_comes_token_by_token_and_whole_characters_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A smile is four bytes, of which GPT-2's vocabulary has no token that is all."""
    smile = tokenizer.encode("🙂").tolist()
    assert len(smile) > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "stream", lambda *_, **__: iter([[token] for token in smile]))
        sample.write(tiny_run.model(), "Hi ", {})
    assert capsys.readouterr().out == "Hi 🙂\n"


@pytest.mark.parametrize("option", ["--tokens=0", "--top-p=0", "--top-p=1.5", "--temperature=-1", "--count=0"])
def test_numbers_that_mean_nothing_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["nowhere", "The", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("size", [300, 50256, 51200])
def test_a_model_of_another_vocabulary_is_refused(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=16, vocab_size=size)).save_pretrained(
        tmp_path
    )
    assert sample.main([str(tmp_path), "The"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"has a vocabulary of {size:,} tokens, where GPT-2's has 50,257" in said.err


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    """Some pad it to 50,304, which makes the head's product faster; these rows stand for no token."""
    model = GPT2(ModelConfig(layers=1, channels=8, heads=1, context=16, vocab=50304))
    model.init_weights(0)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[50257:] = 1.0  # by far the largest logits
    sample.check_vocabulary(model.config.vocab, "padded")
    for top_k in (0, 40):
        assert max(sample.generate(model, [], 20, top_k=top_k)) < 50257


def test_twenty_unicorn_texts_are_an_output_of_a_run(finished: Finished) -> None:
    record = records.read_record(finished.store, "runs/tiny/samples")
    assert record is not None and record.rows == SAMPLES == 20
    assert [parent.key for parent in record.parents] == ["runs/tiny"]
    text = Path(finished.store, "runs/tiny/samples/unicorns.txt").read_text()
    blocks = re.split(r"(?m)^=== sample \d+ ===\n", text)[1:]
    assert len(blocks) == 20 and len(set(blocks)) > 1
    assert all(block.startswith(UNICORN) and len(block) > len(UNICORN) + 8 for block in blocks)
    page = Path(finished.store, "runs/tiny/report/index.html").read_text()
    assert "herd of unicorns" in page and "16 more samples" in page


def test_a_resumed_run_s_samples_take_the_place_of_later_ones(tmp_path: Path) -> None:
    for step, text in ((10, "ten"), (20, "twenty"), (30, "thirty\n=== not a heading"), (20, "again")):
        sample.record(str(tmp_path), step, text)
    assert (tmp_path / "samples.txt").read_text() == "=== step 10 ===\nten\n=== step 20 ===\nagain\n"
