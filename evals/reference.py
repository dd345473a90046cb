"""Which published numbers stand beside ours, where are they from, and is ours better, worse or equal?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evals.comparison import Paired, Rows, paired

Unlike = Literal["other protocol", "other items"]
Verdict = Literal["better", "worse", "equal", "error unknown"] | Unlike

HELLASWAG_ITEMS = 10_042
REPRODUCED_WITHIN = 1.0  # standard errors: the same model on the same items differs by rounding and versions only
EQUAL_WITHIN = 2.0  # standard errors of the difference: 95% of equal models lie inside
# our own metrics, and those of lm-eval that older pages, which don't tell, may have
LOWER_IS_BETTER = ("loss", "bits_per_byte", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter")

LLMC_HELLASWAG = "llm.c, dev/data/hellaswag.py"
LLMC_PLOTS = "llm.c, dev/vislog.ipynb"
GPT3_PAPER = "GPT-3 paper (Brown et al. 2020), zero-shot"
NANOCHAT = "nanochat"

# model -> parameters, and the names by which the hub or we know it
SIZES = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125_000_000, "gpt3-350m": 350_000_000, "gpt3-760m": 760_000_000, "gpt3-1.3b": 1_300_000_000,
}  # fmt: skip
NAMES = {
    "gpt2": "GPT-2 124M", "gpt2-medium": "GPT-2 355M", "gpt2-large": "GPT-2 774M",
    "gpt2-xl": "GPT-2 1558M", "gpt3-125m": "GPT-3 125M", "gpt3-350m": "GPT-3 350M",
    "gpt3-760m": "GPT-3 760M", "gpt3-1.3b": "GPT-3 1.3B",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One number that somebody else measured."""

    model: str
    suite: str
    score: str
    value: float
    source: str
    items: int | None = None  # known where the score is an accuracy over a known set

    @property
    def stderr(self) -> float | None:
        """Of an accuracy over known items; nobody published errors, they follow from the items."""
        return math.sqrt(self.value * (1 - self.value) / self.items) if self.items else None


def _hellaswag(score: str, values: Mapping[str, float], source: str) -> list[Published]:
    return [Published(model, "hellaswag", score, v, source, HELLASWAG_ITEMS) for model, v in values.items()]


def _of_gpt2(small: float, medium: float, large: float, xl: float) -> dict[str, float]:
    return {"gpt2": small, "gpt2-medium": medium, "gpt2-large": large, "gpt2-xl": xl}


PUBLISHED: tuple[Published, ...] = (
    *_hellaswag("completion_acc", {"gpt2": 0.2859, "gpt2-xl": 0.3842}, LLMC_HELLASWAG),
    *_hellaswag("completion_acc_norm", {"gpt2": 0.2955, "gpt2-xl": 0.4893}, LLMC_HELLASWAG),
    *_hellaswag("harness_acc", {"gpt2": 0.2892, "gpt2-xl": 0.4004}, LLMC_HELLASWAG),
    *_hellaswag("harness_acc_norm", {"gpt2": 0.3114, "gpt2-xl": 0.5089}, LLMC_HELLASWAG),
    *_hellaswag("plot_line", _of_gpt2(0.294463, 0.375224, 0.431986, 0.488946), LLMC_PLOTS),
    *_hellaswag(
        "zero_shot",
        {"gpt3-125m": 0.337, "gpt3-350m": 0.436, "gpt3-760m": 0.510, "gpt3-1.3b": 0.547},
        GPT3_PAPER,
    ),
    *(
        Published(model, "core", "core", value, NANOCHAT)
        for model, value in _of_gpt2(0.1139, 0.1849, 0.2146, 0.256525).items()
    ),
)  # fmt: skip


def published(suite: str, score: str) -> dict[str, Published]:
    """By model."""
    return {p.model: p for p in PUBLISHED if (p.suite, p.score) == (suite, score)}


def published_name(model: str) -> str | None:
    """The name under which numbers of a hub model, or of a folder of that name, were published."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return name if name in SIZES else None


def same_size(parameters: int, family: str) -> str | None:
    """The family's ("gpt2" or "gpt3") model within a fifth of this size, if there is one."""
    near = {m: abs(math.log(parameters / n)) for m, n in SIZES.items() if m.startswith(family)}
    best = min(near, key=lambda m: near[m])
    return best if near[best] < math.log(1.2) else None


@dataclass(frozen=True)
class Comparison:
    """Ours against one other number."""

    suite: str
    score: str
    value: float
    stderr: float | None
    against: str  # whose number
    reference: float
    reference_stderr: float | None
    source: str
    difference: float  # ours less theirs
    errors: float | None  # the difference in standard errors of the difference
    same_items: bool  # the error is that of the differences item by item
    verdict: Verdict


def compare(
    suite: str,
    score: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    against: str,
    source: str,
    pair: Paired | None = None,
    unlike: Unlike | None = None,
    lower_is_better: bool = False,
) -> Comparison:
    """Scores are {value, stderr}. Equal means within two standard errors of the difference.

    On the same items (`pair`) that error is the differences' own; else both errors count as if the items had been
    drawn apart, which calls two models equal more often. Scores that are `unlike`, by two protocols as nats per tokens
    of two vocabularies are, or over two sets of items, stand side by side without errors and without a verdict.
    """
    lower = lower_is_better or score.split("/")[-1].split(",")[0] in LOWER_IS_BETTER
    difference = ours["value"] - theirs["value"]
    known = [s["stderr"] for s in (ours, theirs) if s.get("stderr") is not None]
    error = pair.stderr if pair else math.sqrt(math.fsum(e * e for e in known))
    errors = difference / error if error > 0 else (0.0 if pair and difference == 0 else None)
    errors = None if unlike else errors
    return Comparison(
        suite, score, ours["value"], ours.get("stderr"), against, theirs["value"], theirs.get("stderr"),
        source, difference, errors, pair is not None, unlike or _verdict(errors, lower),
    )  # fmt: skip


def _verdict(errors: float | None, lower: bool) -> Verdict:
    if errors is None:
        return "error unknown"
    if abs(errors) <= EQUAL_WITHIN:
        return "equal"
    return "better" if (errors < 0) == lower else "worse"


# published under other names than that of the score: llm.c's plots show its own protocol, normalised by tokens, and
# GPT-3's paper normalises by tokens, too, of prompts that it does not tell in full
SAME_SCORE = {("hellaswag", "completion_acc_norm"): ("plot_line", "zero_shot")}
OTHER_PROTOCOL = ("zero_shot",)


def against_published(scores: Mapping[str, Mapping[str, Any]], model: str) -> list[Comparison]:
    """Every score of a run (suite -> score JSON) that somebody published for `model`."""
    rows = []
    for suite, page in scores.items():
        for score, ours in page["scores"].items():
            for name in (score, *SAME_SCORE.get((suite, score), ())):
                other = published(suite, name).get(model)
                if other:
                    theirs = {"value": other.value, "stderr": other.stderr}
                    against = NAMES.get(model, model)
                    unlike: Unlike | None = "other protocol" if name in OTHER_PROTOCOL else None
                    rows.append(compare(suite, score, ours, theirs, against, other.source, unlike=unlike))
    return rows


def can_reproduce(model: str, suite: str) -> bool:
    """Whether numbers of it were published by a protocol that is measured here."""
    return any((p.model, p.suite) == (model, suite) and p.score not in OTHER_PROTOCOL for p in PUBLISHED)


def reproduces(comparison: Comparison) -> bool:
    """Whether a model's own score is the published one of that model."""
    return comparison.errors is not None and abs(comparison.errors) <= REPRODUCED_WITHIN


def against_run(
    scores: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    against: str,
    items: Mapping[str, Rows] = {},
    other_items: Mapping[str, Rows] = {},
) -> list[Comparison]:
    """Every score that both runs have, by suite and name; item by item where both have a suite's per-item rows.

    Without a verdict where the two pages name different protocols, or where their rows are of other items.
    """
    rows = []
    for suite, page in scores.items():
        other = others.get(suite, {"scores": {}})
        there = page.get("protocol") == other.get("protocol") and suite in items and suite in other_items
        pairs = paired(page, other, items[suite], other_items[suite]) if there else {}
        for score, ours in page["scores"].items():
            theirs = other["scores"].get(score)
            if theirs:
                same = _same_protocol(score, page, other)
                pair = pairs.get(score) if same else None
                differs: Unlike | None = "other items" if score in pairs and pair is None else None
                unlike: Unlike | None = differs if same else "other protocol"
                lower = any(score in one.get("details", {}).get("lower_is_better", ()) for one in (page, other))
                rows.append(compare(suite, score, ours, theirs, against, "measured here", pair, unlike, lower))
    return rows


def _same_protocol(score: str, page: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Of lm-eval's tasks also one version, with as many shots; of a group or an average, of all tasks in both pages."""
    ours, theirs = (one.get("details", {}) for one in (page, other))
    if page.get("protocol") != other.get("protocol") or ours.get("lm_eval") != theirs.get("lm_eval"):
        return False
    if "lm_eval" not in ours:
        return True
    if score == "average" and ours.get("average_of") != theirs.get("average_of"):
        return False
    shared = ours["tasks"].keys() & theirs["tasks"].keys()
    task = score.rpartition("/")[0]
    return all(
        ours["tasks"][name][fact] == theirs["tasks"][name][fact]
        for name in ({task} if task in shared else shared)
        for fact in ("shots", "version")
    )
