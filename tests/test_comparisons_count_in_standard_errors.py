"""Better, worse or equal: by the difference in standard errors, in the direction that each score has."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from evals import comparison, reference
from evals.comparison import Difference, differences, paired
from evals.report import ReportData
from evals.results import mean_score


@pytest.mark.parametrize(
    "score, ours, theirs, verdict",
    [
        ("completion_acc_norm", 0.30, 0.29, "better"),
        ("completion_acc_norm", 0.30, 0.298, "equal"),
        ("harness_acc", 0.27, 0.29, "worse"),
        ("loss", 3.20, 3.29, "better"),
        ("wikitext/word_perplexity", 30.0, 20.0, "worse"),
    ],
)
def test_verdicts(score: str, ours: float, theirs: float, verdict: str) -> None:
    error = 0.003
    row = reference.compare("x", score, {"value": ours, "stderr": error}, {"value": theirs, "stderr": error}, "b", "s")
    assert row.verdict == verdict
    assert row.errors == pytest.approx((ours - theirs) / (error * 2**0.5))


def test_which_way_a_score_is_better_is_told_by_its_page() -> None:
    pages = [
        {
            "eleuther": {
                "scores": {"b/new": {"value": value, "stderr": 0.01}, "b/brier_score": {"value": value, "stderr": 0.01}}
            }
        }
        for value in (0.3, 0.4)
    ]
    told, other = reference.against_run(
        {"eleuther": pages[0]["eleuther"] | {"details": {"lower_is_better": ["b/new"]}}}, pages[1], "b"
    )
    assert (told.verdict, other.verdict) == ("better", "better")  # pages of before tell nothing: what is known by name


def test_the_same_items_are_compared_one_by_one() -> None:
    """scipy's paired t statistic is the difference in standard errors."""
    draw = np.random.default_rng(0)
    hard = draw.normal(3.0, 1.0, 40)
    left = [{"window": n, "tokens": 32, "bytes": 100, "logprob": -32 * v} for n, v in enumerate(hard)]
    better = hard - draw.normal(0.02, 0.01, 40)
    right = [{"window": n, "tokens": 32, "bytes": 100, "logprob": -32 * v} for n, v in enumerate(better)]
    pages = [
        {"validation_loss": {"scores": {"loss": {"value": v.mean(), "stderr": v.std(ddof=1) / 40**0.5}}}}
        for v in (better, hard)
    ]
    items = [{"validation_loss": rows} for rows in (right, left)]
    (apart,) = reference.against_run(*pages, "other")
    (together,) = reference.against_run(*pages, "other", *items)
    assert (apart.verdict, apart.same_items) == ("equal", False)
    assert (together.verdict, together.same_items) == ("better", True)
    assert together.errors == pytest.approx(ttest_rel(better, hard).statistic)


def page(rows: list[dict[str, Any]], suite: str = "x", **scores: float) -> dict[str, Any]:
    """A score's JSON, whose values are the means of the rows where none is given."""
    means = {name: sum(values.values()) / len(values) for name, values in comparison._values(rows).items()}
    found = {name: {"value": value, "stderr": 0.1} for name, value in (means | scores).items()}
    return {"suite": suite, "protocol": "one", "scores": found}


def test_other_items_are_not_paired() -> None:
    rows = [{"protocol": "harness", "ind": n, "correct": n % 2 == 0, "correct_norm": True} for n in range(6)]
    assert set(paired(page(rows), page(rows), rows, rows)) == {"harness_acc", "harness_acc_norm"}
    assert set(paired(page(rows), page(rows[:4]), rows, rows[:4]).values()) == {None}
    labelled, others = ([{**row, "label": (row["ind"] + more) % 4} for row in rows] for more in (0, 1))
    assert None not in paired(page(labelled), page(labelled), labelled, labelled).values()
    # as many, but made from another corpus
    assert set(paired(page(labelled), page(others), labelled, others).values()) == {None}
    found = reference.against_run({"x": page(labelled)}, {"x": page(others)}, "b", {"x": labelled}, {"x": others})
    assert {(row.verdict, row.errors, row.same_items) for row in found} == {("other items", None, False)}


def read(text: str, nats: float) -> list[dict[str, Any]]:
    """Windows of as many tokens, and as many bytes, of some text."""
    return [
        {"window": n, "tokens": 8, "bytes": 30, "sha256": f"{text} {n}", "logprob": -8 * nats * (1 + n % 3 / 100)}
        for n in range(9)
    ]


def test_losses_over_two_corpora_have_no_verdict() -> None:
    """Though their windows are as many, and as long."""
    pages, items = [], []
    for text, nats in (("stories", 3.0), ("code", 2.0), ("stories", 2.0)):
        rows = read(text, nats)
        pages.append({"validation_loss": page(rows, perplexity=math.exp(1.01 * nats))})
        items.append({"validation_loss": rows})
    apart = reference.against_run(pages[0], pages[1], "b", items[0], items[1])
    assert {(row.score, row.verdict, row.errors) for row in apart} == {
        (score, "other items", None) for score in ("loss", "bits_per_byte", "perplexity")
    }
    same = reference.against_run(pages[0], pages[2], "b", items[0], items[2])
    assert {(row.score, row.verdict, row.same_items) for row in same} == {
        (score, "worse", True) for score in ("loss", "bits_per_byte", "perplexity")
    }


def test_a_perplexity_is_as_far_apart_as_its_loss() -> None:
    draw = np.random.default_rng(0)
    pages, items = [], []
    for more in (0.0, 0.03):
        rows = [
            {"window": n, "tokens": 32, "bytes": 100, "logprob": -32 * (3 + v + more)}
            for n, v in enumerate(draw.normal(0, 0.1, 40))
        ]
        loss = sum(-row["logprob"] for row in rows) / 32 / 40
        pages.append({"validation_loss": page(rows, perplexity=math.exp(loss))})
        items.append({"validation_loss": rows})
    found = {row.score: row for row in reference.against_run(*pages, "b", *items)}
    assert found["perplexity"].errors == pytest.approx(found["loss"].errors)
    assert found["perplexity"].verdict == found["loss"].verdict


def lambada(more: float) -> list[dict[str, Any]]:
    """Rows as lm-eval has them: of perplexity, an item's log-likelihood."""
    return [
        {"task": "lambada", "item": n, "filter": "none", "target": "bag",
         "metrics": json.dumps({"acc": float(n % 2), "perplexity": -2 - n / 10 - more})}
        for n in range(9)
    ]  # fmt: skip


def test_a_metric_that_is_no_mean_over_its_items_is_not_paired() -> None:
    pages, items = [], []
    for more in (0.0, 0.02):
        rows = lambada(more)
        value = math.exp(2 + 0.4 + more)
        pages.append({"eleuther": page(rows, **{"lambada/perplexity": value})})
        items.append({"eleuther": rows})
    for score in (found["eleuther"]["scores"] for found in pages):
        score["lambada/perplexity"]["stderr"] = 2.0
    rows_of = {row.score: row for row in reference.against_run(*pages, "b", *items)}
    assert rows_of["lambada/acc"].same_items and not rows_of["lambada/perplexity"].same_items
    assert rows_of["lambada/perplexity"].verdict == "equal"


def core_rows(right: float, seed: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [
        {"task": task, "item": n, "correct": bool(v)}
        for task in ("piqa", "cups")
        for n, v in enumerate(draw.random(50) < right)
    ]


def core_page(rows: list[dict[str, Any]], bundle: str = "a") -> dict[str, Any]:
    made = page(rows, "core")
    chances = {"piqa": 0.5, "cups": 0.25}
    for task, chance in chances.items():
        made["scores"][f"{task}/centred"] = {
            "value": (made["scores"][task]["value"] - chance) / (1 - chance),
            "stderr": 0.1,
        }
    mean = sum(made["scores"][f"{task}/centred"]["value"] for task in chances) / 2
    made["scores"]["core"] = {"value": mean, "stderr": 0.1}
    tasks = {task: {"chance": chance} for task, chance in chances.items()}
    return made | {"details": {"bundle_sha256": bundle, "complete": True, "tasks": tasks}}


def test_core_is_paired_as_its_tasks_are() -> None:
    """The mean's error is that of independent differences, here drawn anew."""
    left, right = core_rows(0.6, 1), core_rows(0.4, 2)
    ours, theirs = core_page(left), core_page(right)
    found = {
        r.score: r
        for r in reference.against_run({"core": ours}, {"core": theirs}, "b", {"core": left}, {"core": right})
    }
    assert all(row.same_items for row in found.values())
    assert found["piqa/centred"].errors == pytest.approx(found["piqa"].errors)
    differences = np.array(
        [
            [float(a["correct"]) - b["correct"] for a, b in zip(left, right, strict=True) if a["task"] == task]
            for task in ("piqa", "cups")
        ]
    ) / [[0.5], [0.75]]
    draw = np.random.default_rng(3)
    again = [np.mean([draw.choice(task, 50).mean() for task in differences]) for _ in range(2000)]
    assert found["core"].errors == pytest.approx(differences.mean() / np.std(again), rel=0.1)
    other = core_page(right, "b")
    apart = reference.against_run({"core": ours}, {"core": other}, "b", {"core": left}, {"core": right})
    assert {row.verdict for row in apart} == {"other items"}


def test_without_any_error_there_is_no_verdict() -> None:
    row = reference.compare("core", "core", {"value": 0.3, "stderr": None}, {"value": 0.2, "stderr": None}, "b", "s")
    assert (row.errors, row.verdict) == (None, "error unknown")


@pytest.mark.parametrize("score", ["loss", "perplexity", "bits_per_byte"])
def test_between_two_protocols_there_is_no_verdict(score: str) -> None:
    """Nats a token of another vocabulary are not nats a token of ours."""
    ours, theirs = ({score: {"value": value, "stderr": 0.01}} for value in (3.0, 4.0))
    pages = [
        {"validation_loss": {"protocol": protocol, "scores": scores}}
        for protocol, scores in (("token windows", ours), ("documents", theirs))
    ]
    items = {"validation_loss": [{"window": n, "tokens": 8, "bytes": 30, "logprob": -9.0 - n} for n in range(4)]}
    (row,) = reference.against_run(*pages, "pythia", items, items)
    assert (row.verdict, row.errors, row.same_items) == ("other protocol", None, False)
    assert (row.value, row.reference) == (3.0, 4.0)
    (same,) = reference.against_run(pages[0], pages[0], "itself")
    assert same.verdict == "equal"


def harness_page(rows: list[dict[str, Any]], shots: int = 0, version: float = 1.0, **details: Any) -> dict[str, Any]:
    tasks = {
        task: {"shots": shots if task == "arc" else 5, "version": version, "truncated": 0} for task in ("arc", "b")
    }
    made = page(rows, "eleuther", average=0.5) | {"details": {"lm_eval": "0.4.13", "tasks": tasks} | details}
    made["scores"]["arcs/acc"] = {"value": 0.5, "stderr": 0.1}  # of a group, whose tasks the page does not tell
    return made


@pytest.mark.parametrize(
    "other, unlike",
    [
        ({}, []),
        ({"shots": 10}, ["arc/acc", "arcs/acc", "average"]),
        ({"version": 2.0}, ["arc/acc", "arcs/acc", "average", "b/acc"]),
        ({"lm_eval": "0.4.9"}, ["arc/acc", "arcs/acc", "average", "b/acc"]),
        ({"average_of": ["arc/acc"]}, ["average"]),
    ],
)
def test_a_task_asked_otherwise_has_no_verdict(other: dict[str, Any], unlike: list[str]) -> None:
    """Of lm-eval's tasks the items are the same, but not what is read before each, nor what it is made into."""
    rows = [
        {"task": task, "item": n, "filter": "none", "target": "A", "metrics": json.dumps({"acc": float(n % 2)})}
        for task in ("arc", "b")
        for n in range(9)
    ]
    pages = [{"eleuther": harness_page(rows, **given)} for given in ({}, other)]
    found = reference.against_run(*pages, "b", {"eleuther": rows}, {"eleuther": rows})
    assert len(found) == 4
    assert sorted(row.score for row in found if row.verdict == "other protocol") == unlike
    assert {row.score for row in found if row.same_items} == {"arc/acc", "b/acc"} - set(unlike)
    older = {"eleuther": {key: value for key, value in harness_page(rows).items() if key != "details"}}
    assert {row.verdict for row in reference.against_run(older, pages[0], "b")} == {"other protocol"}


def test_published_hellaswag_errors_follow_from_its_items() -> None:
    """About .005 at this size; the closed form is that of 10,042 zeros and ones."""
    published = reference.published("hellaswag", "harness_acc_norm")["gpt2-xl"]
    ones = round(published.value * 10_042)
    assert published.stderr == pytest.approx(mean_score([1.0] * ones + [0.0] * (10_042 - ones)).stderr, rel=1e-3)


def test_every_published_number_names_its_source() -> None:
    assert all(p.source for p in reference.PUBLISHED)
    assert reference.published("core", "core")["gpt2-xl"].value == 0.256525
    assert len(reference.PUBLISHED) == 8 + 4 + 4 + 4


def test_a_run_stands_beside_models_of_its_size() -> None:
    assert reference.same_size(124_439_808, "gpt2") == "gpt2"
    assert reference.same_size(1_557_611_200, "gpt3") == "gpt3-1.3b"
    assert reference.same_size(3_300_000, "gpt2") is None


def test_a_run_is_compared_with_what_was_published_for_the_model() -> None:
    scores = {"hellaswag": {"scores": {"completion_acc_norm": {"value": 0.2990, "stderr": 0.0046}}}}
    row, _ = reference.against_published(scores, "gpt2")  # the second is llm.c's plots' line of the same protocol
    assert (row.reference, row.verdict, row.source) == (0.2955, "equal", "llm.c, dev/data/hellaswag.py")


@pytest.mark.parametrize("model", reference.SIZES)
def test_every_published_model_can_be_compared_with(model: str) -> None:
    """GPT-3 by another protocol, without a verdict."""
    scores = {"hellaswag": {"scores": {"completion_acc_norm": {"value": 0.2990, "stderr": 0.0046}}}}
    rows = reference.against_published(scores, model)
    assert rows and all((row.verdict == "other protocol") == model.startswith("gpt3") for row in rows)


def run(lr: float, corpus: str, commit: str, torch: str) -> ReportData:
    made = {"code_version": "1", "dirty": False}
    records = [
        {"asset": "token_shards", "key": f"tokens/{corpus}", "fingerprint": corpus * 8, **made},
        {"asset": "trained_model", "key": "runs/x", "fingerprint": "f", "commit": commit, "versions": {"torch": torch},
         "hardware": {"gpus": ["H100"]}, **made},
    ]  # fmt: skip
    return ReportData("x", {"train": {"lr": lr, "steps": 5}}, records=records)


def test_what_differs_between_runs_is_told_by_area() -> None:
    found = differences(run(1e-3, "aa", "0" * 20, "2.11"), run(2e-3, "bb", "1" * 20, "2.13"))
    assert found == [
        Difference("data", "token_shards", "tokens/aa (aaaaaaaaaaaa)", "tokens/bb (bbbbbbbbbbbb)"),
        Difference("code", "commit", "0" * 12, "1" * 12),
        Difference("configuration", "train.lr", "0.001", "0.002"),
        Difference("environment", "torch", "2.11", "2.13"),
    ]
    assert differences(run(1e-3, "aa", "0", "2.11"), run(1e-3, "aa", "0", "2.11")) == []
