"""Weights to and from Hugging Face folders and llm.c's files: bit for bit, and with transformers' logits."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from storage import objects
from storage.shards import open_shard, write_shard
from training import export
from training.gpt2 import GPT2
from training.model_config import ModelConfig
from training.weights import load_any, read_llmc, write_llmc

SIZES = ModelConfig(layers=2, channels=32, heads=2, context=16, vocab=50257)


@pytest.fixture(scope="module")
def model() -> GPT2:
    made = GPT2(SIZES)
    made.init_weights(1)
    return made


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokens") / "any_val_000000.bin")
    write_shard(path, np.random.default_rng(0).integers(0, 50257, 100).astype(np.uint16))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_folder_loads_in_stock_transformers_with_our_logits(
    model: GPT2, shard: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert export.export_folder(deepcopy(model), str(tmp_path), shard, dtype) == 0
    check = json.loads((tmp_path / export.CHECK).read_text())
    assert check["max_difference"] <= 1e-5
    tokens = torch.from_numpy(open_shard(shard)[:16].astype(np.int64))[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        rounding = (whole(tokens).logits - model.logits(tokens)).abs().max().item()
    assert check["checkpoint_difference"] == pytest.approx(rounding, rel=1e-3, abs=1e-6)
    assert (check["checkpoint_difference"] > 1e-4) == (dtype == torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype and theirs.config.n_positions == 16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer.eos_token_id == 50256
    made = theirs.generate(**tokenizer("Hello world", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 7) and tokenizer.decode(made[0]).startswith("Hello world")


def test_the_shard_that_logits_are_compared_on_may_lie_on_s3(
    model: GPT2, shard: str, s3_store: str, tmp_path: Path
) -> None:
    objects.publish_file(shard, f"{s3_store}/any_val_000000.bin")
    assert export.export_folder(deepcopy(model), str(tmp_path), f"{s3_store}/any_val_000000.bin", torch.float32) == 0


@pytest.mark.parametrize(
    ("source", "tokens", "said"),
    [
        ("no/such/run", "shard.bin", "no/such/run does not exist: give a run folder"),
        ("none.bin", "shard.bin", "none.bin does not exist: give a run folder"),
        ("model.bin", "none.bin", "--tokens none.bin does not exist"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_written(
    model: GPT2, source: str, tokens: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llmc("model.bin", model.state_dict(), SIZES)
    write_shard("shard.bin", np.zeros(20, dtype=np.uint16))
    assert export.main([source, "--out", "out", "--tokens", tokens]) == 2 and said in caplog.text
    assert not Path("out").exists()


def test_a_folder_with_other_logits_fails_the_check(model: GPT2, shard: str, tmp_path: Path) -> None:
    other = GPT2(SIZES)
    other.init_weights(2)
    export.write_folder(other, str(tmp_path), torch.float32)
    result = export.check(model, str(tmp_path), shard, torch.float32)
    assert result["max_difference"] > result["tolerance"]


def test_an_export_with_other_logits_says_by_how_much(
    model: GPT2, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # which nothing keeps to
    write_llmc(str(tmp_path / "given.bin"), model.state_dict(), SIZES)
    out = str(tmp_path / "out")
    assert export.main([str(tmp_path / "given.bin"), "--out", out, "--tokens", shard]) == 1
    assert re.search(r"logits differ by \S+, above the tolerance of -1: ", caplog.text)


def test_a_hugging_face_model_comes_in_and_goes_out_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16))
    theirs.save_pretrained(tmp_path / "in")
    ours = load_any(str(tmp_path / "in"))
    assert ours.config == SIZES
    export.write_folder(ours, str(tmp_path / "out"), torch.float32)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_that_is_not_gpt2_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, activation_function="relu")
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="activation_function='relu'"):
        load_any(str(tmp_path))


def test_a_folder_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill in random ones."""
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16))
    some = {name: weight for name, weight in theirs.state_dict().items() if ".h.1." not in name}
    theirs.save_pretrained(tmp_path, state_dict=some)
    with pytest.raises(ValueError, match="lacks 12 of its model's weights"):
        load_any(str(tmp_path))


@pytest.mark.parametrize(("dtype", "version"), [(torch.float32, 3), (torch.bfloat16, 5)])
def test_llm_c_files_round_trip_bit_for_bit(model: GPT2, dtype: torch.dtype, version: int, tmp_path: Path) -> None:
    weights = {name: w.to(dtype) for name, w in model.state_dict().items()}
    path = str(tmp_path / "new" / "folder" / "model.bin")  # which a folder's export makes, too
    write_llmc(path, weights, SIZES)
    config, found = read_llmc(path)
    assert config == SIZES
    assert all(torch.equal(found[name], w) for name, w in weights.items())
    assert np.fromfile(path, dtype="<i4", count=8).tolist() == [20240326, version, 16, 50257, 2, 2, 32, 50304]


def test_llm_c_finds_each_tensor_where_it_looks(model: GPT2, tmp_path: Path) -> None:
    """By llm.c's own arithmetic: `fill_in_parameter_sizes` and the order of `ParameterTensors`."""
    path = str(tmp_path / "model.bin")
    write_llmc(path, model.state_dict(), SIZES)
    V, C, L, T = 50304, 32, 2, 16
    sizes = [V * C, T * C, L * C, L * C, L * 3 * C * C, L * 3 * C, L * C * C, L * C, L * C, L * C]
    sizes += [L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C, C, C]
    tensors = np.split(np.fromfile(path, dtype="<f4", offset=1024), np.cumsum(sizes)[:-1])
    second = model.blocks[1]
    expected = {4: second.attn.c_attn.weight, 6: second.attn.c_proj.weight, 10: second.mlp.c_fc.weight}
    expected |= {11: second.mlp.c_fc.bias, 12: second.mlp.c_proj.weight, 8: second.ln_2.weight}
    for place, tensor in expected.items():
        half = tensors[place][len(tensors[place]) // 2 :]  # of the second layer
        assert np.array_equal(half, tensor.detach().numpy().ravel()), place
    assert np.array_equal(tensors[0].reshape(V, C)[:50257], model.wte.weight.detach().numpy()[:50257])
    assert len(tensors[-1]) == C


@pytest.mark.parametrize(("place", "value", "said"), [(0, 1, "no llm.c model"), (1, 2, "version 2")])
def test_another_file_is_refused(model: GPT2, place: int, value: int, said: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.bin")
    write_llmc(path, model.state_dict(), SIZES)
    values = np.fromfile(path, dtype="<i4")
    values[place] = value
    values.tofile(path)
    with pytest.raises(ValueError, match=said):
        read_llmc(path)


def test_a_cut_off_file_is_refused(model: GPT2, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_llmc(str(path), model.state_dict(), SIZES)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="broken"):
        read_llmc(str(path))


def test_a_run_starts_from_given_weights(tmp_path: Path) -> None:
    given = tiny_run.model(seed=7)
    write_llmc(str(tmp_path / "given.bin"), given.state_dict(), given.config)
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(steps=1, init_from=str(tmp_path / "given.bin")))
    shards = tiny_run.tokens(tmp_path / "tokens")
    trainer = tiny_run.steps(run, shards)
    with torch.no_grad():
        expected = given(*trainer.load(range(8)))
    assert tiny_run.losses(run)[0] == pytest.approx(float(expected), abs=1e-5)


def test_given_weights_of_another_size_are_refused(model: GPT2, tmp_path: Path) -> None:
    write_llmc(str(tmp_path / "given.bin"), model.state_dict(), SIZES)
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(init_from=str(tmp_path / "given.bin")))
    with pytest.raises(ValueError, match="but the run's is"):
        tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"))
