"""Which other models stand beside a run in its report? Those that were asked the very same, and fine-tuned ones.

A model counts once it has been scored on the run's validation shard: `gpt2 evals MODEL --like RUN`. A run of the
recipe `finetune` on the same tokens counts by itself.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from assets.making import Maker
from assets.models import scored_here
from assets.run_config import known_runs
from evals import reference, results
from evals.comparison import Rows
from evals.report import Baseline
from storage import objects, records
from storage.records import Record
from training.config import SUITES, RunConfig

log = logging.getLogger(__name__)

WINDOWS = ("items", "window")  # of a loss's configuration: their number follows from their length and the shard


@dataclass(frozen=True)
class Beside:
    """Another model's scores of the same questions."""

    name: str  # that it is asked for by
    label: str  # in figures and tables
    scores: tuple[Record, ...]


def beside(maker: Maker, run: str, scores: Sequence[Record]) -> list[Beside]:
    """What stands in the run's report; `scores` are the run's."""
    return [
        other for other in asked_the_same(maker, run, scores) if "validation_loss" in {s.asset for s in other.scores}
    ]


def asked_the_same(maker: Maker, run: str, scores: Sequence[Record]) -> list[Beside]:
    """Every model, and every fine-tuned run, with a score of the same questions as one of the run's."""
    wanted = {score.asset: score for score in scores}
    context = maker.run_config(run).model.context
    found = []
    for name, label, window, theirs in _others(maker, run, context):
        same = tuple(s for s in theirs if s.asset in wanted and _same_questions(s, wanted[s.asset], window, context))
        if same:
            found.append(Beside(name, label, same))
    return found


def _others(maker: Maker, run: str, context: int) -> Iterator[tuple[str, str, int, list[Record]]]:
    """Name, label, the window of a loss that names none, scores."""
    store = maker.places.store
    for folder, theirs in scored_here(store).items():
        own = records.read_record(store, f"models/{folder}")
        name = str(own.metrics["name"]) if own else folder.rsplit("-", 1)[0]
        if name != run:
            yield name, reference.NAMES.get(reference.published_name(name) or "", name), context, theirs
    for name in known_runs(maker.places):
        if name != run and (config := _finetuned(maker, name)):
            there = (records.read_record(store, f"runs/{name}/scores/{suite}") for suite in SUITES)
            yield name, f"{name} (fine-tuned)", config.model.context, [record for record in there if record]


def _finetuned(maker: Maker, run: str) -> RunConfig | None:
    """The configuration of a fine-tuned run; None for any other, and for one that can't be read."""
    try:
        config = maker.run_config(run)
    except ValueError as error:
        log.warning("run %r stands beside no other: %s", run, error)
        return None
    return config if config.recipe == "finetune" else None


def _same_questions(theirs: Record, ours: Record, window: int, context: int) -> bool:
    """Put by the same code. A loss is one of windows as long as the run's context; items are the same for any."""
    if theirs.code_version != ours.code_version:
        return False
    if theirs.asset == "validation_loss" and theirs.config.get("window", window) != context:
        return False
    return _questions(theirs) == _questions(ours) and _reads(theirs) == _reads(ours)


def _questions(score: Record) -> dict[str, Any]:
    ignored = WINDOWS if score.asset == "validation_loss" else ()
    return {key: value for key, value in score.config.items() if key not in ignored}


def _reads(score: Record) -> set[str]:
    """Fingerprints of the items or tokens; the model is what may differ."""
    return {p.fingerprint for p in score.parents if not p.key.startswith("models/") and not p.key.endswith("/export")}


def baseline(store: str, other: Beside) -> Baseline:
    return Baseline(
        other.label,
        {score.asset: page(store, score) for score in other.scores},
        {score.asset: items(store, score) for score in other.scores},
    )


def page(store: str, score: Record) -> dict[str, Any]:
    """A score's JSON."""
    found: dict[str, Any] = objects.read_json(records.output_url(store, score.key))
    return found


def items(store: str, score: Record) -> Rows:
    """A score's rows, one an item."""
    name = page(store, score)["per_item"]
    return results.read_items(objects.join(records.folder_url(store, score.key), name))
