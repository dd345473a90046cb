"""CORE on a small bundle of the published layout, against transformers' logits and the definition."""

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_gpt2
import torch
from transformers import GPT2LMHeadModel

from evals import core
from evals.model import LoadedModel, load
from evals.scoring import Scorer
from storage import tokenizer

CHOICES = [
    {"query": f"Question {n}: what is {n} plus {n}?\nAnswer:", "choices": [str(2 * n), "a cat", "7 dogs"], "gold": 0}
    for n in range(6)
]
SCHEMA = [
    {"context_options": [f"The cup did not fit into bag {n} because the cup", f"The cup left bag {n} because the bag"],
     "continuation": "was too large.", "gold": n % 2}
    for n in range(5)
]  # fmt: skip
LANGUAGE = [{"context": f"One, two, {n} and then comes  ", "continuation": "three"} for n in range(4)]
PAGE = """icl_tasks:
- {label: sums, dataset_uri: a/sums.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- {label: cups, dataset_uri: a/cups.jsonl, num_fewshot: [0], icl_task_type: schema, continuation_delimiter: ' '}
- {label: counting, dataset_uri: a/counting.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""


def write_bundle(folder: Path) -> str:
    data = folder / "eval_data" / "a"
    data.mkdir(parents=True)
    (folder / "core.yaml").write_text(PAGE)
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\nsums,math,33.0\ncups,language,50\ncounting,language,0.0\n"
    )
    for name, items in (("sums", CHOICES), ("cups", SCHEMA), ("counting", LANGUAGE)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save(tmp_path_factory.mktemp("model")), "cpu")


def losses(reference: GPT2LMHeadModel, text: str) -> tuple[list[int], torch.Tensor, list[int]]:
    """Tokens after EOT, the loss of each, and the likeliest token at each place."""
    tokens = [tokenizer.EOT, *tokenizer.encode(text).tolist()]
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0, :-1].double()
    wanted = torch.tensor(tokens[1:])
    return tokens[1:], torch.nn.functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1).tolist()


def common(lines: list[list[int]]) -> int:
    return next(i for i, several in enumerate(zip(*lines, strict=False)) if len(set(several)) > 1)


def shuffled(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = list(items)
    random.Random(1337).shuffle(order)
    return order


def examples(items: list[dict[str, Any]], number: int, count: int) -> list[dict[str, Any]]:
    others = [i for i in range(len(items)) if i != number]
    return [items[i] for i in random.Random(1234 + number).sample(others, count)]


def expected_sums(reference: GPT2LMHeadModel) -> float:
    items, right = shuffled(CHOICES), 0
    for number, item in enumerate(items):
        shown = "".join(f"{e['query']} {e['choices'][e['gold']]}\n\n" for e in examples(items, number, 2))
        lines = [losses(reference, f"{shown}{item['query']} {choice}") for choice in item["choices"]]
        start = common([tokens for tokens, _, _ in lines])
        means = [loss[start:].mean().item() for _, loss, _ in lines]
        right += means.index(min(means)) == item["gold"]
    return right / len(items)


def expected_cups(reference: GPT2LMHeadModel) -> float:
    items, right = shuffled(SCHEMA), 0
    for item in items:
        lines = [losses(reference, f"{context} {item['continuation']}") for context in item["context_options"]]
        length = common([tokens[::-1] for tokens, _, _ in lines])
        means = [loss[-length:].mean().item() for _, loss, _ in lines]
        right += means.index(min(means)) == item["gold"]
    return right / len(items)


def test_core_equals_its_definition_over_the_logits_of_transformers(model: LoadedModel, tmp_path: Path) -> None:
    result = core.evaluate(model, Scorer(model), write_bundle(tmp_path))
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    sums, cups = expected_sums(reference), expected_cups(reference)
    assert result.scores["sums"].value == sums
    assert result.scores["cups"].value == cups
    assert result.scores["counting"].value == 0.0  # a random model's likeliest token is not the one
    assert result.scores["sums/centred"].value == pytest.approx((sums - 0.33) / 0.67)
    assert result.scores["core"].value == pytest.approx(((sums - 0.33) / 0.67 + (cups - 0.5) / 0.5 + 0.0) / 3)
    assert result.details["complete"] is False  # 3 tasks are no CORE
    assert result.items == 6 + 5 + 4 == len(result.per_item)


def test_a_continuation_that_the_model_would_write_is_right(model: LoadedModel, tmp_path: Path) -> None:
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    _, _, likeliest = losses(reference, "One, two, 0 and then comes what")
    word = tokenizer.encoding().decode([likeliest[-1]])
    task = core.Task(
        "t", "language_modeling", ({"context": "One, two, 0 and then comes", "continuation": word},), 0, "", 0.0
    )
    ((request,),) = core.requests(task, model.encode, model.eot)
    (scored,) = Scorer(model).score([request])
    assert core._is_right(task, task.items[0], [scored])


def test_long_prompts_keep_their_end(model: LoadedModel) -> None:
    request = core.Request("x", tuple(range(1, 200)), (7, 8))
    cut = core.crop(request, model.context)
    assert len(cut.context) + len(cut.continuation) == model.context
    assert cut.context[-1] == 199 and cut.continuation == (7, 8)
    with pytest.raises(ValueError, match="x can't be scored"):
        core.crop(core.Request("x", (1, 2), tuple(range(200))), model.context)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "eval_data" / "a" / "cups.jsonl").unlink(), "CORE task cups has no data"),
        (lambda f: (f / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsums,33\n"), "cups has no chance"),
        (lambda f: (f / "core.yaml").unlink(), "holds no core.yaml"),
        (lambda f: (f / "eval_data" / "a" / "sums.jsonl").write_text(""), "sums has 0 items"),
    ],
)
def test_what_is_missing_is_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        core.read_bundle(folder)


def test_the_archive_is_unpacked_whole_and_an_incomplete_bundle_is_refused(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "source")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for file in sorted(Path(source).rglob("*")):
            packed.write(file, Path("eval_bundle") / file.relative_to(source))
    (tmp_path / "cache").mkdir()
    core.unpack(buffer.getvalue(), str(tmp_path / "cache"))
    assert len(core.read_bundle(str(tmp_path / "cache" / "eval_bundle"))) == 3
    with pytest.raises(ValueError, match="holds 3 tasks, CORE has 22"):
        core.fetch(str(tmp_path / "cache"))
