"""What can't be scored is an error that names it; bad input ends with status 2 and one line; never a 0.0."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny_gpt2
import torch
from safetensors.torch import load_file, save_file

from evals import hellaswag, results, run
from evals.model import load
from evals.results import EvalResult, Score
from evals.scoring import Request, Scorer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_gpt2.save(tmp_path_factory.mktemp("model"))


def nothing(**given: Any) -> run.Inputs:
    return run.Inputs(**{"items": "", "shard": "", "tasks": (), "task_path": "", "bundle": "", "limit": 0, **given})


def test_a_model_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills in random ones; the head, whose weights are the embedding's, is stored in no GPT-2."""
    file = Path(tiny_gpt2.save(tmp_path)) / "model.safetensors"
    whole = load_file(file)
    assert "lm_head.weight" not in whole and load(str(tmp_path), "cpu").context == 128
    save_file({k: v for k, v in whole.items() if ".h.1." not in k}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 12 of its model's weights: transformer\.h\.1\.attn\.c_attn\.bias, .* …"
    ):
        load(str(tmp_path), "cpu")


def test_an_infinite_log_probability_names_its_item(folder: str, tmp_path: Path) -> None:
    model = load(folder, "cpu")
    scorer = Scorer(model)
    with torch.no_grad():
        model.module.transformer.wte.weight[0] = float("nan")
    items = hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "items.jsonl"))
    with pytest.raises(ValueError, match=r"items.jsonl item \d, ending \d .* can't be scored: .* nan"):
        hellaswag.evaluate(model, scorer, items, "hellaswag")


@pytest.mark.parametrize("context, continuation, what", [((), (1,), "context"), ((1,), (), "continuation")])
def test_nothing_to_score_is_an_error(folder: str, context: tuple, continuation: tuple, what: str) -> None:
    with pytest.raises(ValueError, match=f"item 7 can't be scored: its {what} has no tokens"):
        Scorer(load(folder, "cpu")).score([Request("item 7", context, continuation)])


def test_a_continuation_longer_than_the_context_is_an_error(folder: str) -> None:
    with pytest.raises(ValueError, match="item 7 can't be scored: its continuation has 200 tokens"):
        Scorer(load(folder, "cpu")).score([Request("item 7", (1,), (2,) * 200)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": ""}, "item 2, has no label"),
        ({"label": 4}, "label 4"),
        ({"endings": ["one"]}, "1 endings"),
        ({"endings": ["a", " ", "c", "d"]}, "item 2: every ending must hold text"),
        ({"endings": ["a", "b", "[title]", "d"]}, "item 2: every ending must hold text besides WikiHow's markup"),
        ({"ctx": ""}, "item 2, has no ctx"),
    ],
)
def test_an_item_that_is_not_whole_is_named(change: dict, message: str, tmp_path: Path) -> None:
    file = tiny_gpt2.write_items(tmp_path / "bad.jsonl", [tiny_gpt2.ITEMS[0], {**tiny_gpt2.ITEMS[1], **change}])
    with pytest.raises(ValueError, match=f"bad.jsonl.*{message}"):
        hellaswag.read_items(file)


def test_no_items_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no items"):
        hellaswag.read_items(tiny_gpt2.write_items(tmp_path / "empty.jsonl", []))


def test_a_score_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    result = EvalResult("core", "harness", {}, {"core": Score(float("nan"), None, 3)}, 3, 0, [{"item": 1}])
    with pytest.raises(ValueError, match="core: core is nan"):
        results.publish(result, str(tmp_path / "core.json"), 1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "suite, inputs, message",
    [
        ("helaswag", nothing(), "use one of"),
        ("hellaswag", nothing(), "--items"),
        ("validation_loss", nothing(), "--shard"),
        ("core", nothing(), "--bundle"),
        ("eleuther", nothing(), "either --tasks"),
        ("eleuther", nothing(items="x", tasks=("piqa",)), "either --tasks"),
        ("hellaswag", nothing(items="absent.jsonl"), "--items absent.jsonl: there is no such file"),
        ("validation_loss", nothing(shard="absent.bin"), "--shard absent.bin: there is no such file"),
    ],
)
def test_missing_inputs_are_refused_before_anything_is_loaded(suite: str, inputs: run.Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.check("gpt2", suite, inputs)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evals.run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_command_writes_scores_and_items_or_nothing(folder: str, tmp_path: Path) -> None:
    items = tiny_gpt2.write_items(tmp_path / "items.jsonl")
    out = tmp_path / "scores" / "completion_demo.json"
    done = command(folder, "--suite", "completion_demo", "--items", items, "--out", str(out), "--limit", "2")
    assert done.returncode == 0, done.stderr
    page = json.loads(out.read_text())
    assert page["suite"] == "completion_demo"
    assert set(page["scores"]) == {f"{p}_{s}" for p in ("completion", "harness") for s in ("acc", "acc_norm")}
    assert page["items"] == 2 and page["truncated"] == 0
    assert page["versions"]["torch"] == torch.__version__
    assert pyarrow.parquet.read_table(out.with_name(page["per_item"])).num_rows == 4


def test_the_command_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    items = tiny_gpt2.write_items(tmp_path / "items.jsonl")
    done = command(str(tmp_path), "--suite", "hellaswag", "--items", items, "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert (
        done.stderr.strip() == f"{tmp_path} holds no config.json: give a Hugging Face model folder (a run's `export`)"
    )
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "x.txt"), "--out 'x.txt' must end in .json: the per-item parquet is named after it"),
        (("--out", "x.json", "--device", "gpu"), "device 'gpu' is none of torch's: use auto, cpu, cuda or cuda:1 …"),
    ],
)
def test_the_command_refuses_what_it_could_not_do_before_it_scores(
    arguments: tuple[str, ...], said: str, folder: str, tmp_path: Path
) -> None:
    items = tiny_gpt2.write_items(tmp_path / "items.jsonl")
    done = command(folder, "--suite", "hellaswag", "--items", items, *arguments)
    assert done.returncode == 2 and done.stderr.strip() == said


@pytest.mark.parametrize("option", ["--limit", "--window", "--batch"])
def test_the_command_refuses_a_negative_number(option: str, folder: str, tmp_path: Path) -> None:
    items = tiny_gpt2.write_items(tmp_path / "items.jsonl")
    done = command(folder, "--suite", "hellaswag", "--items", items, "--out", str(tmp_path / "x.json"), option, "-1")
    assert done.returncode == 2 and f"Invalid value for '{option}'" in done.stderr, done.stderr
    assert not (tmp_path / "x.json").exists()
