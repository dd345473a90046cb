"""lm-eval's own task definitions over a few local items: our scorer and its `hf` model give the same results."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tiny_gpt2
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evals import harness, run
from evals.harness_model import HarnessModel
from evals.harness_tasks import SUITES, Part
from evals.model import LoadedModel, load
from evals.scoring import Scorer, rolling

OWN = Path(lm_eval.__file__).parent / "tasks"


def arc(n: int) -> dict[str, Any]:
    choices = {"text": [f"{n} dogs", "a large cat", "rain", "nothing"], "label": ["A", "B", "C", "D"]}
    return {"question": f"What falls on day {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]}


def hellaswag(n: int) -> dict[str, Any]:
    return {**tiny_gpt2.ITEMS[n % 3], "ind": n}


def mmlu(n: int) -> dict[str, Any]:
    return {"question": f"Is {n} even? ", "choices": ["yes", "no", "maybe", "never"], "answer": n % 2}


def truthful(n: int) -> dict[str, Any]:
    targets = {"choices": [f"It is {n}.", "Nobody knows.", "It is a long story."], "labels": [1, 1, 0]}
    return {"question": f"What is {n}?", "mc1_targets": targets, "mc2_targets": targets}


def winogrande(n: int) -> dict[str, Any]:
    return {
        "sentence": f"The cup is in bag {n} since the _ is small.",
        "option1": "cup",
        "option2": "bag",
        "answer": "1",
    }


def gsm8k(n: int) -> dict[str, Any]:
    return {"question": f"What is {n} plus 1?", "answer": f"We add 1. #### {n + 1}"}


def wikitext(n: int) -> dict[str, Any]:
    return {"page": f" = Heading {n} = \n\n The first @-@ class town has {n} houses . " * 30}


def lambada(n: int) -> dict[str, Any]:
    return {"text": f"She had {n} cups and one small bag, so she put each of the cups into the bag"}


def piqa(n: int) -> dict[str, Any]:
    return {"goal": f"Warm {n} cups.", "sol1": "Put them into the oven.", "sol2": "Sing to them.", "label": n % 2}


TASKS = {
    "arc_challenge": (arc, "arc/arc_challenge.yaml", "train", "test"),
    "hellaswag": (hellaswag, "hellaswag/hellaswag.yaml", "train", "validation"),
    "truthfulqa_mc2": (truthful, "truthfulqa/truthfulqa_mc2.yaml", None, "validation"),
    "winogrande": (winogrande, "winogrande/default.yaml", "train", "validation"),
    "gsm8k": (gsm8k, "gsm8k/gsm8k.yaml", "train", "test"),
    "lambada_openai": (lambada, "lambada/lambada_openai.yaml", None, "test"),
    "piqa": (piqa, "piqa/piqa.yaml", "train", "validation"),
    "arc_easy": (arc, "arc/arc_easy.yaml", "train", "test"),
    "wikitext": (wikitext, "wikitext/wikitext.yaml", None, "test"),
}


def write_tasks(folder: Path) -> str:
    """Each task includes lm-eval's own file and changes where its data lies; MMLU is a group of one subject."""
    for name, (make, own, train, test) in TASKS.items():
        splits = {test: 4} | ({train: 27} if train else {})
        page = [f"include: {OWN / own}", f"task: {name}", *_data(folder, name, make, splits)]
        page += ["training_split: null", "validation_split: null"] if name == "wikitext" else []
        if name == "gsm8k":
            page.append('generation_kwargs: {until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: 6}')
        (folder / f"{name}.yaml").write_text("\n".join(page) + "\n")
    page = [f"include: {OWN / 'mmlu/default/_default_template_yaml'}", "task: mmlu_sums", "description: ''"]
    page += _data(folder, "mmlu_sums", mmlu, {"dev": 6, "test": 4})
    (folder / "mmlu_sums.yaml").write_text("\n".join(page) + "\n")
    group = "group: mmlu\ntask: [mmlu_sums]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "mmlu.yaml").write_text(group)
    return str(folder)


def _data(folder: Path, name: str, make: Any, splits: dict[str, int]) -> list[str]:
    files = {}
    for split, count in splits.items():
        file = folder / f"{name}_{split}.jsonl"
        file.write_text("".join(json.dumps(make(n)) + "\n" for n in range(count)))
        files[split] = str(file)
    kwargs = json.dumps({"data_files": files, "cache_dir": str(folder / "cache")})
    return ["dataset_path: json", "dataset_name: null", f"dataset_kwargs: {kwargs}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save(tmp_path_factory.mktemp("model"), context=256), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for parts in SUITES.values() for part in parts], ids=lambda p: p.task)
def test_each_task_scores_as_with_lm_evals_own_model(part: Part, model: LoadedModel, folder: str) -> None:
    theirs = lm_eval.simple_evaluate(
        model=HFLM(model.name, device="cpu", dtype="float32", batch_size=2),
        tasks=[part.task], num_fewshot=part.shots, bootstrap_iters=1000,
        task_manager=harness._manager([part.task], folder),
    )  # fmt: skip
    assert theirs is not None
    ours = harness.evaluate(model, Scorer(model), [part], folder)
    expected = harness._scores(theirs)
    assert set(ours.scores) == set(expected)
    for name, score in expected.items():
        assert ours.scores[name].value == pytest.approx(score.value, rel=1e-4 if "perplexity" in name else 1e-6), name
        assert ours.scores[name].n == 4
    if part.task == "gsm8k":
        responses = [row["responses"] for row in harness._per_item(theirs["samples"])]
        assert [row["responses"] for row in ours.per_item] == responses


def test_the_suite_runs_its_six_tasks_with_their_shots_and_counts_what_was_cut(model: LoadedModel, folder: str) -> None:
    parts = SUITES["leaderboard-v1"]
    result = harness.evaluate(model, Scorer(model), parts, folder, limit=2, suite="leaderboard-v1")
    wanted = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "mmlu_sums": 5}
    tasks = result.details["tasks"]
    assert {task: facts["shots"] for task, facts in tasks.items()} == wanted
    assert all(facts["items"] == 2 for facts in tasks.values())
    assert tasks["arc_challenge"]["truncated"] == 2 * 4  # 25 examples do not fit into 256 tokens
    assert tasks["truthfulqa_mc2"]["truncated"] == 0
    assert result.truncated == sum(facts["truncated"] for facts in tasks.values())
    assert result.details["lm_eval"] == lm_eval.__version__
    mean = sum(result.scores[f"{part.task}/{part.metric}"].value for part in parts) / 6
    assert result.scores["average"].value == pytest.approx(mean)
    assert result.items == 12 == result.wanted
    assert len(result.per_item) == 12 + 2  # GSM8K's answers are read by two filters


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save_llama(tmp_path_factory.mktemp("llama")), "cpu")


def asked(kind: str, *several: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments, n, ("texts", n, 1)) for n, arguments in enumerate(several)]


def test_requests_begin_with_bos_where_those_of_lm_eval_do(llama: LoadedModel) -> None:
    """Of a pair, after no context, of a text that begins with BOS already, over several windows, and before a text."""
    theirs = HFLM(llama.name, device="cpu", dtype="float32", softmax_dtype="float64", batch_size=1)
    ours = HarnessModel(llama, Scorer(llama))
    texts = ("Hello world", "<s>Hello world", "", "Ends in a space ")
    assert [ours.tok_encode(text) for text in texts] == [theirs.tok_encode(text) for text in texts]
    assert ours.tok_encode("Hello world") == [50257, 15496, 995]
    pairs = asked("loglikelihood", *((text, " and more of it") for text in texts))
    for (mine, greedy), (logprob, likeliest) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert (mine, greedy) == (pytest.approx(logprob, abs=1e-5), likeliest)
    whole = asked("loglikelihood_rolling", ("One cup of rain. " * 40,), ("Short.",))
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-4)
    options = {"until": [" a"], "max_gen_toks": 12, "do_sample": False}
    wanted = asked("generate_until", *((text, options) for text in ("Hello world", "The other, longer text is")))
    assert ours.generate_until(wanted) == theirs.generate_until(wanted)


def test_a_text_ends_at_the_models_end_token_not_at_its_first(llama: LoadedModel) -> None:
    """The head is turned so that `</s>` is the likeliest token after two others."""
    theirs = HFLM(llama.name, device="cpu", dtype="float32", batch_size=1)
    wanted = asked("generate_until", ("Hello world", {"until": [], "max_gen_toks": 8, "do_sample": False}))
    whole = HarnessModel(llama, Scorer(llama)).generate_until(wanted)
    third = llama.encode(whole)[0][2]
    for module in (llama.module, theirs.model):
        with torch.no_grad():
            module.lm_head.weight[50258] = 2 * module.lm_head.weight[third]
    try:
        (text,) = HarnessModel(llama, Scorer(llama)).generate_until(wanted)
        assert text == theirs.generate_until(wanted)[0]
        assert len(llama.encode([text])[0]) < 8
    finally:
        with torch.no_grad():
            llama.module.lm_head.weight[50258] = 0


def test_a_groups_items_are_those_of_its_own_tasks(model: LoadedModel, tmp_path: Path) -> None:
    """As MMLU's: a group of groups, here of 4 and of 4 + 3 items."""
    write_tasks(tmp_path)
    for name, count in (("mmlu_more", 4), ("mmlu_few", 3)):
        lines = (tmp_path / "mmlu_sums.yaml").read_text().splitlines()
        files = _data(tmp_path, name, mmlu, {"dev": 6, "test": count})
        kept = [line for line in lines if not line.startswith(("task:", "dataset_"))]
        (tmp_path / f"{name}.yaml").write_text("\n".join([*kept, f"task: {name}", *files]) + "\n")
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    groups = {"mmlu": "[stem, words]", "stem": "[mmlu_sums]", "words": "[mmlu_more, mmlu_few]"}
    for name, parts in groups.items():
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: {parts}\n{mean}")
    scores = harness.evaluate(model, Scorer(model), [Part("mmlu", 0)], str(tmp_path)).scores
    assert {name.removesuffix("/acc"): score.n for name, score in scores.items()} == {
        "mmlu": 11, "stem": 4, "words": 7, "mmlu_sums": 4, "mmlu_more": 4, "mmlu_few": 3,
    }  # fmt: skip


def test_which_scores_are_better_when_lower_is_lm_evals_word(model: LoadedModel, tmp_path: Path) -> None:
    """Its own of a known metric, or the task's, with a filter or without, and of a group of groups."""
    folder = write_tasks(tmp_path)
    named = "[{metric: acc, aggregation: mean, higher_is_better: true}, {metric: brier_score}]"
    own = (tmp_path / "mmlu_sums.yaml").read_text()
    (tmp_path / "mmlu_sums.yaml").write_text(f"{own}metric_list: {named}\n")
    group = "{metric: acc, weight_by_size: true}, {metric: brier_score, weight_by_size: true}"
    for name, part in (("mmlu", "stem"), ("stem", "mmlu_sums")):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [{part}]\naggregate_metric_list: [{group}]\n")
    counted = "[{metric: exact_match, aggregation: mean, higher_is_better: false}]"
    page = tmp_path / "gsm8k.yaml"
    page.write_text(f"{page.read_text()}metric_list: {counted}\n")
    parts = [Part("mmlu", 0), Part("gsm8k", 0), Part("piqa", 0)]
    result = harness.evaluate(model, Scorer(model), parts, folder, limit=2)
    lower = [f"{task}/brier_score" for task in ("mmlu", "stem", "mmlu_sums")]
    lower += [f"gsm8k/exact_match,{kind}" for kind in ("strict-match", "flexible-extract")]
    assert sorted(result.details["lower_is_better"]) == sorted(lower)
    assert set(lower) < set(result.scores)


def test_out_of_memory_while_texts_are_generated_halves_their_rows(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"until": [" a"], "max_gen_toks": 5, "do_sample": False}
    wanted = asked("generate_until", *((f"Text {n} " * (n % 7 + 1), options) for n in range(21)))
    whole = HarnessModel(llama, Scorer(llama)).generate_until(wanted)
    forward, rows = llama.module.forward, []

    def small_memory(input_ids: torch.Tensor, **named: Any) -> Any:
        rows.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError(f"no room for more than {most} rows")
        return forward(input_ids, **named)

    monkeypatch.setattr(llama.module, "forward", small_memory)
    most = 4
    assert HarnessModel(llama, Scorer(llama)).generate_until(wanted) == whole
    assert [n for n in rows if n > most] == [16, 8]  # it failed twice, and kept to what fits from then on
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        HarnessModel(llama, Scorer(llama, share_prefixes=False)).generate_until(wanted)


def test_the_network_is_left_alone_only_where_all_tasks_are_a_folders_own(folder: str, tmp_path: Path) -> None:
    def local(suite: str, tasks: str = "", path: str = folder) -> bool:
        return run._is_local(suite, run.Inputs("", "", tuple(tasks.split(",")) if tasks else (), path, "", 0))

    assert local("eleuther", "gsm8k,mmlu") and local("leaderboard-v1") and local("zero-shot")
    assert not local("eleuther", "gsm8k,boolq")
    assert not local("eleuther", "gsm8k", path="")
    (tmp_path / "mix.yaml").write_text("group: mix\ntask: [{task: mine, num_fewshot: 1}, boolq]\n")
    (tmp_path / "mine.yaml").write_text("task: mine\nprocess_docs: !function code.py.read\n")
    assert local("eleuther", "mine", str(tmp_path)) and not local("eleuther", "mix", str(tmp_path))
    assert not local("leaderboard-v1", path=str(tmp_path))
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"broken.yaml is no task file of lm-eval's"):
        local("eleuther", "mine", str(tmp_path))


@pytest.mark.slow
def test_an_unknown_task_is_named(folder: str) -> None:
    with pytest.raises(ValueError, match="has no task no_such_task"):
        harness._manager(["no_such_task"], folder)


@pytest.mark.parametrize("missing, cause", [("file", "FileNotFoundError: .*jsonl"), ("split", "KeyError: 'absent'")])
def test_a_task_that_fails_is_named(missing: str, cause: str, model: LoadedModel, tmp_path: Path) -> None:
    """By the error itself, which stands last in the output, where whoever launched the eval looks."""
    folder = write_tasks(tmp_path)
    if missing == "file":
        (tmp_path / "winogrande_validation.jsonl").unlink()
    else:
        page = tmp_path / "winogrande.yaml"
        page.write_text(page.read_text() + "validation_split: absent\n")
    with pytest.raises(RuntimeError, match=f"lm-eval's task winogrande failed: {cause}"):
        harness.evaluate(model, Scorer(model), [Part("winogrande", 0)], folder)


def test_a_task_whose_item_cannot_be_scored_is_named(folder: str, tmp_path: Path) -> None:
    broken = load(tiny_gpt2.save(tmp_path), "cpu")
    with torch.no_grad():
        broken.module.transformer.wte.weight[0] = float("nan")
    with pytest.raises(ValueError, match="lm-eval's task winogrande failed: .* can't be scored"):
        harness.evaluate(broken, Scorer(broken), [Part("winogrande", 0)], folder)


def test_rolling_windows_are_those_of_lm_eval() -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 7, 8, 9, 16, 21):
        tokens = list(range(100, 100 + count))
        theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 0, 8, 1)]
        assert [(list(a), list(b)) for a, b in rolling(tokens, 0, 8)] == [(list(a), list(b)) for a, b in theirs]


@pytest.mark.parametrize("most", [256, 300])
def test_texts_as_long_as_the_context_are_refused(most: int, model: LoadedModel) -> None:
    asked = Instance("generate_until", {}, ("What is 1?", {"max_gen_toks": most}), 0, ("sums", 0, 1))
    with pytest.raises(ValueError, match=f"sums: max_gen_toks={most} leaves no room .* context of 256 tokens"):
        HarnessModel(model, Scorer(model)).generate_until([asked])
