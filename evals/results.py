"""What does an eval hand back, and how is it written so that a score can be trusted and taken apart later?"""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow
import pyarrow.parquet

from storage import objects, parquet, records

LIBRARIES = ("torch", "transformers", "tokenizers", "tiktoken", "lm_eval", "numpy")  # whose versions a score states


@dataclass(frozen=True)
class Score:
    value: float
    stderr: float | None  # standard error of the mean over the items; None where the metric has none
    n: int  # items behind the value


@dataclass(frozen=True)
class EvalResult:
    suite: str
    protocol: str
    model: dict[str, Any]
    scores: dict[str, Score]
    items: int
    truncated: int  # requests that lost context tokens on the left
    per_item: list[dict[str, Any]] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)  # what defines the task beyond its name
    wanted: int | None = None  # items that there were to score, counted where they come from; None: who asks knows


def mean_score(values: Sequence[float]) -> Score:
    """Mean and its standard error, sample deviation / sqrt(n), as lm-eval's. Raises ValueError if empty."""
    n = len(values)
    if n == 0:
        raise ValueError("no items to average: the eval's items are empty")
    mean = math.fsum(values) / n
    if n == 1:
        return Score(mean, None, n)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Score(mean, math.sqrt(variance / n), n)


def average(scores: Sequence[Score]) -> Score:
    """Mean over tasks; its error follows from theirs, the tasks being independent."""
    errors = [s.stderr for s in scores if s.stderr is not None]
    stderr = math.sqrt(math.fsum(e * e for e in errors)) / len(scores) if len(errors) == len(scores) else None
    return Score(math.fsum(s.value for s in scores) / len(scores), stderr, sum(s.n for s in scores))


def publish(result: EvalResult, out: str, seconds: float) -> dict[str, Any]:
    """Write OUT.json and, before it and beside it, the per-item parquet: the JSON says that all is there."""
    check_finite(result)
    per_item = out.removesuffix(".json") + ".parquet"
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(result.per_item), buffer, compression="zstd")
    objects.publish_bytes(per_item, buffer.getvalue())
    page = {
        "suite": result.suite,
        "protocol": result.protocol,
        "model": result.model,
        "scores": {name: asdict(score) for name, score in result.scores.items()},
        "items": result.items,
        "items_wanted": result.wanted,
        "truncated": result.truncated,
        "details": result.details,
        "versions": records.library_versions(LIBRARIES),
        "seconds": round(seconds, 3),
        "per_item": objects.name_of(per_item),
    }
    objects.publish_json(out, page)
    return page


def read_items(url: str) -> list[dict[str, Any]]:
    """The per-item rows of a score, from its parquet."""
    return parquet.read_table(url).to_pylist()


def check_finite(result: EvalResult) -> None:
    for name, score in result.scores.items():
        if not math.isfinite(score.value):
            raise ValueError(f"{result.suite}: {name} is {score.value}, which is no score")
