"""Better, worse or equal: by the difference in standard errors, in the direction that each score has."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from evals import reference
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


def test_other_items_are_not_paired() -> None:
    rows = [{"protocol": "harness", "ind": n, "correct": n % 2 == 0, "correct_norm": True} for n in range(6)]
    assert set(paired(rows, rows)) == {"harness_acc", "harness_acc_norm"}
    assert paired(rows, rows[:5]) == {}
    labelled, others = ([{**row, "label": (row["ind"] + more) % 4} for row in rows] for more in (0, 1))
    assert paired(labelled, labelled) and not paired(labelled, others)  # as many, but made from another corpus
    core = [{"task": "piqa", "item": n, "correct": True} for n in range(3)]
    lm_eval = [{"task": "piqa", "item": n, "filter": "none", "metrics": '{"acc": 1.0}'} for n in range(3)]
    assert set(paired(core, core)) == {"piqa"} and set(paired(lm_eval, lm_eval)) == {"piqa/acc"}


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
