"""How good is a run while it trains? One score of each checkpoint that it keeps.

An op, not an asset: a run's scores are those of its finished model. What it makes is recorded all the same, and
shows as an observation of the trained model.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets import shown
from assets.asked import Asked, Missing, asked
from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import POOL, RUNS, Event
from assets.scores import ALL_SCORED, DTYPES, VERSION, produced
from assets.tokens import validation_shard
from assets.trainer import trained_output
from storage import objects, records
from storage.checkpoints import DONE, checkpoint_url, complete, done_files, step_name
from storage.records import Record
from training.config import RunConfig

WEIGHTS = ("model.safetensors", "state.json")  # of a checkpoint; the optimizer's state is not needed


class CheckpointConfig(StageConfig):
    step: int = Field(description="The step of a complete checkpoint.")


@dg.op(pool=POOL, out=dg.Out(dg.Nothing), code_version=VERSION)
def score_checkpoint(context: dg.OpExecutionContext, config: CheckpointConfig, maker: dg.ResourceParam[Maker]) -> None:
    """HellaSwag of a checkpoint; where its items are not at hand, the completion items from held-out documents."""
    name = context.partition_key
    run = maker.run_config(name)
    questions = questions_of(maker, name, run)
    output = checkpoint_output(maker, name, run, config.step, questions)
    produce = partial(_score, maker, name, run, config.step, questions)
    made, (check,) = maker.make(config, output, produce, [ALL_SCORED])
    if not check.passed:
        raise ValueError(f"{questions.suite} of {name}'s step {config.step} is not whole: {made.record.metrics}")
    facts: dict[str, Any] = {
        "step": config.step,
        "suite": questions.suite,
        "location": dg.MetadataValue.path(made.location),
    }
    scores = shown.scores(made.record.metrics["scores"])
    context.log_event(dg.AssetObservation("trained_model", partition=name, metadata=facts | scores))


@dg.job(partitions_def=RUNS)
def checkpoint_scores() -> None:
    """Score one checkpoint of a run that may still be training; it waits until the cards are free."""
    score_checkpoint()


def unscored(maker: Maker, name: str) -> dict[int, str]:
    """Steps of the checkpoints that a run keeps for good and that nothing has scored -> what tells such a checkpoint
    from another of its name and step; the last step has its suites."""
    train = maker.run_config(name).train
    places = [records.folder_url(maker.places.store, f"runs/{name}"), maker.folder(f"runs/{name}")]
    made = {step: f"{s.written:.6f}" for place in places for step, s in done_files(place).items()}  # own ones count
    every = train.keep_every
    kept = [step for step in sorted(made) if every and step % every == 0 and 0 < step < train.steps]
    return {step: made[step] for step in kept if records.read_record(maker.places.store, _key(name, step)) is None}


def questions_of(maker: Maker, name: str, run: RunConfig) -> Asked:
    """HellaSwag's, or where its items are not at hand the completion items'."""
    questions = asked(maker, "hellaswag", run.evals, name)
    if isinstance(questions, Missing):
        questions = asked(maker, "completion_demo", run.evals, name)
    if isinstance(questions, Missing):
        raise ValueError(f"no checkpoint of {name} can be scored: {questions.reason}")
    return questions


def checkpoint_output(maker: Maker, name: str, run: RunConfig, step: int, questions: Asked) -> Output:
    """The weights have no record while they are trained: their output as it will be, and the step, define them."""
    tokens = maker.input(name, "tokens", "token_shards")
    definition = {"step": step, "suite": questions.suite, "dtype": run.evals.dtype}
    parents: list[Record | Output] = [trained_output(name, run, tokens), tokens, *questions.reads]
    return Output("checkpoint_scores", _key(name, step), VERSION, definition, parents)


def run_with(maker: Maker, name: str, step: int, scratch: str) -> str:
    """A local run folder with the weights of a checkpoint: the run's own, or a copy of what another machine's training
    has mirrored."""
    own, mirror = maker.folder(f"runs/{name}"), records.folder_url(maker.places.store, f"runs/{name}")
    there = [step in complete(place) for place in (own, mirror)]
    if there != [False, True]:
        return own
    run = objects.join(scratch, "run")
    for file in (*WEIGHTS, DONE):
        objects.copy(objects.join(checkpoint_url(mirror, step), file), objects.join(checkpoint_url(run, step), file))
    return run


@contextmanager
def scratch_of(maker: Maker, key: str) -> Iterator[str]:
    """A local folder for a model, gone afterwards, with what one that was killed has left in it."""
    scratch = maker.places.home / "work" / key
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)  # one that is just being killed may write once more
    try:
        yield str(scratch)
    finally:
        shutil.rmtree(scratch)


def _key(name: str, step: int) -> str:
    return f"runs/{name}/checkpoint_scores/{step_name(step)}"


def _score(
    maker: Maker, name: str, run: RunConfig, step: int, questions: Asked, progress: Callable[[Event], None]
) -> Produced:
    out = Path(maker.folder(_key(name, step)), f"{questions.suite}.json")
    dtype = DTYPES[run.evals.dtype]
    with scratch_of(maker, _key(name, step)) as scratch:
        exported = f"{scratch}/export"
        maker.launcher.run(
            "training.export",
            [run_with(maker, name, step, scratch), "--step", str(step), "--out", exported, "--dtype", dtype]
            + ["--tokens", validation_shard(maker, name)],
            progress,
        )
        maker.launcher.run("evals.run", questions.command(exported, str(out), dtype), progress)
    found = produced(str(out), questions, run.machine.price_per_gpu_hour)
    return replace(found, metrics=found.metrics | {"step": step})
