"""What of a run would be made anew now, and why? Its stages as they are wanted, beside the records that are there."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from assets import checks, corpus, items, model, report, samples, scores, tokens, trainer
from assets.asked import Missing, asked
from assets.baselines import beside
from assets.card import outputs_of
from assets.making import Maker, Output
from assets.run_config import check_documents, source_of
from evals import core_bundle
from storage import records
from storage.records import Record
from training.config import SUITES, RunConfig

State = Literal["fresh", "stale", "missing"]


@dataclass(frozen=True)
class Stage:
    run: str
    stage: str
    key: str  # "" where it can't be known before what it is made from is there
    state: State
    reason: str


class NotThere(ValueError):
    """What a stage is made from has not been made."""


@dataclass
class _Run:
    """The stages of a run so far. What a stage would be now is what the later ones would be made from."""

    maker: Maker
    name: str
    found: list[Stage] = field(default_factory=list)
    expected: dict[str, Record] = field(default_factory=dict)  # by key

    def look(self, stage: str, wanted: Callable[[], Output], key: str = "") -> None:
        """Note how a stage stands; `key` is where it lies, as far as that is known without what it is made from."""
        store = self.maker.places.store
        try:
            output = self._of_today(wanted())
        except ValueError as error:  # an input that is not made, or a source that can't be had: it says which
            there = records.read_record(store, key) if key else None
            self.found.append(Stage(self.name, stage, key, "stale" if there else "missing", str(error)))
            return
        there, (whole, reason) = records.read_record(store, output.key), output.reusable(store)
        state: State = "fresh" if whole else "stale" if there else "missing"
        self.found.append(Stage(self.name, stage, output.key, state, reason))
        if there:
            self.expected[output.key] = replace(there, fingerprint=output.fingerprint)

    def _of_today(self, output: Output) -> Output:
        """Made from what its parents would be now, not from what they were."""
        return replace(output, parents=[self.expected.get(p.key, p) for p in output.parents])

    def last(self, stage: str) -> Record:
        key = next(s.key for s in reversed(self.found) if s.stage == stage)
        if key not in self.expected:
            raise NotThere(f"it is made from {stage}, which is not there")
        return self.expected[key]


def _documents(maker: Maker, name: str, run: RunConfig) -> Output:
    source = source_of(maker.places, name, run.corpus)
    check_documents(maker.places, name, source)
    return corpus.documents_output(source)


def stages(maker: Maker, name: str) -> list[Stage]:
    """Every stage that a run's configuration asks for, from documents to report."""
    run, config = _Run(maker, name), maker.run_config(name)
    run.look("documents", lambda: _documents(maker, name, config))
    run.look("token_shards", lambda: _tokens(config, run.last("documents")))
    if config.evals.hellaswag:
        run.look("eval_items", lambda: _hellaswag(maker, config))
    run.look("eval_items", lambda: _items(run, config))
    if config.train.init_from:
        run.look("starting_weights", lambda: trainer.starting_output(config))
    run.look("trained_model", lambda: trainer.trained_output(name, config, run.last("token_shards")), f"runs/{name}")
    export = f"runs/{name}/export"
    run.look("hf_model", lambda: model.export_output(name, config, run.last("trained_model")), export)
    written = partial(samples.samples_output, name, config)
    run.look("samples", lambda: written(run.last("trained_model")), f"runs/{name}/samples")
    for suite in SUITES:
        if suite not in ("hellaswag", "core") or getattr(config.evals, suite):
            run.look(suite, partial(_score, run, suite, config), f"runs/{name}/scores/{suite}")
    run.look("inspection", partial(_inspection, run, config))
    run.look("report", partial(_report, run), f"runs/{name}/report")
    return run.found


def _tokens(config: RunConfig, documents: Record) -> Output:
    return tokens.tokens_output(config, documents, documents.metrics["text_bytes"])


def _hellaswag(maker: Maker, config: RunConfig) -> Output:
    revision = items.revision_at_hand(items.hellaswag_at_hand(maker, config.evals))
    return items.hellaswag_output(config.evals, revision)


def _items(run: _Run, config: RunConfig) -> Output:
    run.last("token_shards")
    return corpus.completion_output(run.maker, run.name, config.evals)


def _score(run: _Run, suite: str, config: RunConfig) -> Output:
    if suite == "core" and not core_bundle.is_there(config.evals.core):
        raise NotThere(f"its data is not in {config.evals.core} yet")  # to ask is not to fetch it
    questions = asked(run.maker, suite, config.evals, run.name)
    if isinstance(questions, Missing):
        raise NotThere(questions.reason)
    return scores.score_output(questions, f"runs/{run.name}", run.last("hf_model"), config.evals.dtype)


def _inspection(run: _Run, config: RunConfig) -> Output:
    run.last("eval_items")
    return checks.inspection_output(run.maker, run.name, config, checks.core_items(config))


def _report(run: _Run) -> Output:
    run.last("hf_model")
    parts = outputs_of(run.maker, run.name)
    return report.report_output(run.name, parts, beside(run.maker, run.name, parts))
