"""What does Dagster see? The assets, the jobs over them, and what they work with."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import dagster as dg

from assets import checks, corpus, model, samples, scores, tokens
from assets.checkpoints import checkpoint_scores
from assets.making import Maker
from assets.models import score_models
from assets.report import report
from assets.resources import RUNS, Launcher, Listener, Silent
from assets.trainer import stop_early
from pipeline import instance, launchpad, sensors
from storage.places import places
from training.config import SUITES

ASSETS = [
    corpus.documents,
    tokens.token_shards,
    corpus.eval_items,
    model.trained_model,
    model.hf_model,
    samples.samples,
    scores.validation_loss,
    scores.hellaswag,
    scores.completion_demo,
    scores.eleuther,
    scores.core,
    checks.inspected,
    report,
]
RESCORED = (*SUITES, "report")


def rescore(names: Iterable[str] = RESCORED) -> dict[str, Any]:
    """Run configuration that makes these outputs anew, also where their fingerprints say that nothing changed."""
    again = {"config": {"recompute": True}}
    return {"ops": {name: {"ops": {"write_report": again}} if name == "report" else again for name in names}}


def _maker(listener: Listener) -> dg.ResourceDefinition:
    """What every asset works with; whoever executes a run makes it first, and says here who that is."""

    def begin(context: dg.InitResourceContext) -> Iterator[Maker]:
        maker = Maker(places(), Launcher(), listener)
        with ExitStack() as stack:
            if context.instance is not None and context.run is not None:
                stack.enter_context(instance.owned(context.instance, context.run))
            try:
                yield maker
            finally:
                for name in [*maker.trainings]:  # begun while its shards were made, and never joined: a stage failed
                    stop_early(maker, name)

    return dg.ResourceDefinition(begin)


def build(listener: Listener | None = None) -> dg.Definitions:
    """The definitions, with whoever listens to their progress; the places come from the environment."""
    return dg.Definitions(
        assets=ASSETS,
        jobs=[
            dg.define_asset_job(
                "full_pipeline",
                dg.AssetSelection.all(),
                partitions_def=RUNS,
                description="Documents to report; every output that is there with the same fingerprint is reused.",
            ),
            dg.define_asset_job(
                "evals_only",
                dg.AssetSelection.groups("evals"),
                partitions_def=RUNS,
                config=rescore(),
                description="Score the run's exported model anew and rewrite its report; nothing else is touched.",
            ),
            score_models,
            dg.define_asset_job(
                "inspect_data",
                dg.AssetSelection.groups("checks"),
                partitions_def=RUNS,
                description="Look at the run's corpus: eval items in it, duplicates, held-out documents, lengths.",
            ),
            *launchpad.jobs(),
            checkpoint_scores,
        ],
        sensors=[sensors.dead_runs, sensors.new_checkpoints],
        resources={
            "maker": _maker(listener or Silent()),
            "new_run": launchpad.new_run(),
        },
        # The heavy work happens in processes of its own; steps in one process save 1.6 s each.
        executor=dg.in_process_executor,
    )


defs = build()
