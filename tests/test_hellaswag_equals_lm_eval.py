"""HellaSwag's harness protocol, and our scorer under lm-eval's own tasks, against lm-eval's `hf` model."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import tiny_gpt2
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals import harness, hellaswag
from evals.model import load
from evals.results import EvalResult
from evals.scoring import Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2.save(tmp_path_factory.mktemp("model"))


def lm_eval_says(folder: str, items: list[hellaswag.Item], tmp_path: Path) -> dict[str, Any]:
    """lm-eval's hellaswag, its own model class; float64 in the softmax only, where its sum would round."""
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(harness._raw(item)) + "\n" for item in items))
    task = harness._task("items", file, tmp_path)
    model = HFLM(folder, device="cpu", dtype="float32", softmax_dtype="float64", batch_size=4)
    out = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000
    )
    assert out is not None
    return out


def ours(folder: str, items: list[hellaswag.Item]) -> EvalResult:
    model = load(folder, "cpu")
    return hellaswag.evaluate(model, Scorer(model), items, "hellaswag")


def agree(result: EvalResult, theirs: dict[str, Any]) -> None:
    mine = [row for row in result.per_item if row["protocol"] == "harness"]
    samples = sorted(theirs["samples"]["items"], key=lambda s: s["doc_id"])
    assert len(mine) == len(samples)
    for row, sample in zip(mine, samples, strict=True):
        expected = [response[0] for response in sample["filtered_resps"]]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-5), row["ind"]
        best, second = np.sort(expected)[::-1][:2]
        assert row["choice"] == int(np.argmax(expected)) or best - second < 2e-5
    scores = theirs["results"]["items"]
    for name in ("acc", "acc_norm"):
        assert result.scores[f"harness_{name}"].value == scores[f"{name},none"]
        assert result.scores[f"harness_{name}"].stderr == pytest.approx(scores[f"{name}_stderr,none"], rel=1e-9)


def test_raw_items_score_as_in_lm_eval(folder: str, tmp_path: Path) -> None:
    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "raw.jsonl"))
    agree(ours(folder, items), lm_eval_says(folder, items, tmp_path))


@pytest.mark.parametrize("bos", ["<s>", "<|endoftext|>"])
def test_a_tokenizer_that_adds_bos_scores_as_in_lm_eval(bos: str, tmp_path: Path) -> None:
    folder = tiny_gpt2.save_llama(tmp_path / "llama", bos)
    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "raw.jsonl"))
    agree(ours(folder, items), lm_eval_says(folder, items, tmp_path))


@pytest.mark.slow
def test_real_items_score_as_in_lm_eval(folder: str, tmp_path: Path, shared_data: Path) -> None:
    """From both halves: the first are ActivityNet's, the later WikiHow's."""
    lines = gzip.decompress((shared_data / "hellaswag_val.jsonl.gz").read_bytes()).decode().splitlines()
    some = [json.loads(line) for line in lines[:12] + lines[6000:6012]]
    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "real.jsonl", some))
    agree(ours(folder, items), lm_eval_says(folder, items, tmp_path))


def test_endings_are_the_same_tokens_alone_as_after_their_context(folder: str) -> None:
    """With GPT-2's tokenizer, whatever the white space; another model's encodes each context with its ending."""
    draw = random.Random(1)
    texts = ["".join(draw.choices(" \n\t's1a.!é中 ", k=draw.randrange(1, 9))) for _ in range(4000)]
    prompts = [(f"x{a}", (b, b[::-1])) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    model = load(folder, "cpu")
    contexts = model.encode([context.rstrip() for context, _ in prompts])
    alone = hellaswag._harness_endings(prompts, contexts, model)
    assert alone == hellaswag._harness_endings(prompts, contexts, replace(model, gpt2_vocabulary=False))


def test_lm_eval_over_our_scorer_gives_lm_evals_numbers(folder: str, tmp_path: Path) -> None:
    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "raw.jsonl"))
    model = load(folder, "cpu")
    result = harness.evaluate_items(model, Scorer(model), items)
    theirs = lm_eval_says(folder, items, tmp_path)
    for name in ("acc", "acc_norm"):
        assert result.scores[f"{harness.LOCAL_TASK}/{name}"].value == theirs["results"]["items"][f"{name},none"]
        assert result.scores[f"{harness.LOCAL_TASK}/{name}"].stderr == theirs["results"]["items"][f"{name}_stderr,none"]
    assert result.items == 3


def test_completion_protocol_scores_raw_text_as_llm_c(folder: str, tmp_path: Path) -> None:
    """llm.c encodes the raw context and " ending" apart, sums the ending's losses, averages over tokens."""
    from transformers import GPT2LMHeadModel

    from storage import tokenizer

    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "raw.jsonl"))
    rows = [row for row in ours(folder, items).per_item if row["protocol"] == "completion"]
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    for row, raw in zip(rows, tiny_gpt2.ITEMS, strict=True):
        context = tokenizer.encode(raw["ctx"]).tolist()
        sums, means = [], []
        for ending in raw["endings"]:
            tokens = tokenizer.encode(" " + ending).tolist()
            with torch.no_grad():
                logits = reference(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].double()
            logprobs = logits.log_softmax(-1)[range(len(tokens)), tokens]
            sums.append(logprobs.sum().item())
            means.append(logprobs.mean().item())
        assert row["logprobs"] == pytest.approx(sums, abs=1e-5)
        assert row["choice"] == int(np.argmax(sums))
        assert row["choice_norm"] == int(np.argmax(means))


def test_items_without_ctx_a_are_split_where_the_last_sentence_is_in_lower_case() -> None:
    assert hellaswag.split_context("A man is on a roof. he") == ("A man is on a roof.", "he")
    assert hellaswag.split_context("A boy jumps. He lands. the boy") == ("A boy jumps. He lands.", "the boy")
    assert hellaswag.split_context("How to rest. Lie down.") == ("How to rest. Lie down.", "")
    assert hellaswag.split_context("no sentence ends here") == ("no sentence ends here", "")
