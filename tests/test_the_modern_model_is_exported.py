"""The speed recipe's model, exported, is stock transformers: the same logits, loss and text, without code of ours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

from evals import model as evals_model
from evals.scoring import Request, Scorer
from storage.shards import write_shard
from training import export, sample
from training.model_config import ModelConfig
from training.modern import Modern
from training.weights import load_any, write_llmc

SIZES = ModelConfig(layers=2, channels=64, heads=2, context=32, family="nanochat")


@pytest.fixture(scope="module")
def model() -> Modern:
    """Random in every weight: a fresh one predicts nothing, since its head begins at zero."""
    made = Modern(SIZES)
    made.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
        for table in (made.wte.weight, made.head.weight):
            table[SIZES.vocab :] = 0.0
    return made


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES.vocab, 100).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(model: Modern, tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    shard = str(place / "any_val_000000.bin")
    write_shard(shard, tokens)
    assert export.export_folder(model, str(place / "model"), shard, torch.float32) == 0
    return place / "model"


def test_stock_transformers_gives_our_logits_and_our_loss(model: Modern, folder: Path, tokens: np.ndarray) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(theirs, NanoChatForCausalLM) and "auto_map" not in json.loads(
        (folder / "config.json").read_text()
    )
    check = json.loads((folder / export.CHECK).read_text())
    assert check["max_difference"] <= 1e-5 and check["largest_logit"] > 1
    row = torch.from_numpy(tokens[: SIZES.context + 1].astype(np.int64))[None]
    with torch.no_grad():
        logits = theirs(row[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[0, 1:])
        torch.testing.assert_close(model(row[:, :-1], row[:, 1:]), loss)


def test_in_bf16_too(model: Modern, folder: Path, tmp_path: Path) -> None:
    copy = Modern(SIZES)  # the check rounds the model that it is given
    copy.load_state_dict(model.state_dict())
    shard = str(folder.parent / "any_val_000000.bin")
    assert export.export_folder(copy, str(tmp_path), shard, torch.bfloat16) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_folder_has_gpt2s_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world")["input_ids"] == [15496, 995] and tokenizer.eos_token_id == 50256


def test_it_comes_in_and_goes_out_bit_for_bit(model: Modern, folder: Path) -> None:
    again = load_any(str(folder))
    assert again.config == SIZES
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_its_evals_score_what_the_model_says(model: Modern, folder: Path, tokens: np.ndarray) -> None:
    loaded = evals_model.load(str(folder), device="cpu")
    assert (loaded.eot, loaded.context, loaded.gpt2_vocabulary) == (50256, SIZES.context, True)
    line = [50256, *tokens[:20].tolist()]
    scorer = Scorer(loaded)
    assert scorer.head is not None and scorer.cap == 15.0  # only the wanted positions' logits are computed
    scored = scorer.score([Request("text", (50256,), tuple(line[1:]))])[0]
    with torch.no_grad():
        expected = model(torch.tensor([line[:-1]]), torch.tensor([line[1:]]))
    assert -scored.logprob / 20 == pytest.approx(float(expected), rel=1e-5)


def test_greedy_text_of_run_and_folder_equals_transformers(model: Modern, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[3, 4, 5]])
    made = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert sample.generate(model, [3, 4, 5], 20, temperature=0) == made[0, 3:].tolist()
    assert sample.generate(load_any(str(folder)), [3, 4, 5], 20, temperature=0) == made[0, 3:].tolist()


def test_llm_cs_format_is_refused(model: Modern, folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="llm.c's format holds GPT-2 only, and this is a nanochat model"):
        write_llmc(path, model.state_dict(), SIZES)
    assert export.main([str(folder), "--out", path]) == 2 and not Path(path).exists()


def test_another_variant_of_the_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        load_any(str(tmp_path / "other"))
