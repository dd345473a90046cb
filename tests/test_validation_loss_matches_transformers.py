"""Loss and bits per byte on a token shard, against the loss that transformers itself computes."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_gpt2
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from evals import validation_loss
from evals.model import LoadedModel, load
from evals.scoring import Scorer
from storage import shards, tokenizer

TEXT = "The naïve reader asks: what is a shard? It holds tokens — nothing else. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save(tmp_path_factory.mktemp("model"), context=32), "cpu")


@pytest.fixture
def shard(tmp_path: Path) -> str:
    document = np.concatenate([[tokenizer.EOT], tokenizer.encode(TEXT * 3)]).astype(np.uint16)
    shards.write_shard(str(tmp_path / "x_val_000000.bin"), np.tile(document, 4))
    return str(tmp_path / "x_val_000000.bin")


def test_loss_equals_that_of_transformers(model: LoadedModel, shard: str) -> None:
    tokens = np.asarray(shards.open_shard(shard)).astype(np.int64)
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    losses, bits, sizes = [], [], []
    for start in range(0, len(tokens) - 32, 32):
        window = torch.tensor(tokens[start : start + 33])[None]
        with torch.no_grad():
            logits = reference(window[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
        bits.append(losses[-1] * 32 / math.log(2))
        text = [tokenizer.encoding().decode_single_token_bytes(t) for t in window[0, 1:].tolist() if t != 50256]
        sizes.append(len(b"".join(text)))
    result = validation_loss.evaluate(model, Scorer(model), shard)
    assert result.items == len(losses) == result.wanted
    assert result.scores["loss"].value == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.scores["loss"].stderr == pytest.approx(np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-3)
    assert result.scores["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.scores["bits_per_byte"].value == pytest.approx(sum(bits) / sum(sizes), rel=1e-6)


def save_of_another_vocabulary(folder: Path) -> ByteLevelBPETokenizer:
    own = ByteLevelBPETokenizer()
    own.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>"])
    PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, bos_token="<s>").save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_layer=1, n_embd=16, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return own


def test_another_vocabulary_reads_the_documents_as_text(shard: str, tmp_path: Path) -> None:
    """Each whole document from its start, in windows of which every token is predicted once."""
    own = save_of_another_vocabulary(tmp_path)
    model = load(str(tmp_path), "cpu")
    result = validation_loss.evaluate(model, Scorer(model), shard)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = [0, *own.encode(TEXT * 3).ids]
    total, at = 0.0, 0
    while at < len(tokens) - 1:
        end = min(at + 64, len(tokens) - 1)
        first = max(0, end - 64)
        with torch.no_grad():
            logits = reference(torch.tensor([tokens[first:end]])).logits[0, at - first :].double()
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(tokens[at + 1 : end + 1]), reduction="sum"
        ).item()
        at = end
    assert (
        result.protocol == "documents" and result.items == result.wanted == 3
    )  # four EOTs: the last document may be cut
    assert result.scores["bits_per_byte"].value == pytest.approx(
        total / math.log(2) / len((TEXT * 3).encode()), rel=1e-6
    )
    assert result.scores["loss"].value == pytest.approx(total / (len(tokens) - 1), rel=1e-6)


def test_an_empty_document_is_no_item_that_was_left_unscored(shard: str, tmp_path: Path) -> None:
    save_of_another_vocabulary(tmp_path)
    model = load(str(tmp_path), "cpu")
    whole = validation_loss.evaluate(model, Scorer(model), shard)
    tokens = np.asarray(shards.open_shard(shard))
    shards.write_shard(shard, np.concatenate([[tokenizer.EOT, tokenizer.EOT], tokens]).astype(np.uint16))
    result = validation_loss.evaluate(model, Scorer(model), shard)
    assert result.items == result.wanted == 3 and result.scores == whole.scores


@pytest.mark.parametrize("tokens", [range(40), [tokenizer.EOT, 5, 6, 7], [tokenizer.EOT, tokenizer.EOT, 5]])
def test_another_vocabulary_needs_a_whole_document(tokens: Sequence[int], tmp_path: Path) -> None:
    """The two ends of the shard cut through the only document, or it holds no text."""
    save_of_another_vocabulary(tmp_path)
    model, cut = load(str(tmp_path), "cpu"), str(tmp_path / "x_val_000000.bin")
    shards.write_shard(cut, np.array(tokens, dtype=np.uint16))
    with pytest.raises(ValueError, match="x_val_000000.bin holds no whole document"):
        validation_loss.evaluate(model, Scorer(model), cut)


def test_bytes_of_all_tokens_are_the_bytes_of_the_text(shard: str) -> None:
    tokens = np.asarray(shards.open_shard(shard))
    assert validation_loss.token_bytes()[tokens].sum() == len((TEXT * 12).encode())


def test_error_of_bits_per_byte_is_that_of_resampled_windows() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(90, 140, 200)
    rows = [{"logprob": -float(s * draw.normal(0.7, 0.05)), "bytes": int(s), "tokens": 32} for s in sizes]
    again = [validation_loss.bits_per_byte([rows[i] for i in draw.integers(0, 200, 200)]).value for _ in range(500)]
    assert validation_loss.bits_per_byte(rows).stderr == pytest.approx(np.std(again), rel=0.15)


def test_limit_is_in_tokens_and_a_short_shard_is_one_window(model: LoadedModel, shard: str, tmp_path: Path) -> None:
    assert len(validation_loss.windows(shard, 32, limit=96)) == 3
    short = str(tmp_path / "short_val_000000.bin")
    shards.write_shard(short, np.arange(10, dtype=np.uint16))
    assert [len(w.continuation) for w in validation_loss.windows(short, 32)] == [9]


def test_a_shard_of_one_token_is_refused(tmp_path: Path) -> None:
    shards.write_shard(str(tmp_path / "x_val_000000.bin"), np.array([5], dtype=np.uint16))
    with pytest.raises(ValueError, match="at least 2"):
        validation_loss.windows(str(tmp_path / "x_val_000000.bin"), 32)
