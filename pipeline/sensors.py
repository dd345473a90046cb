"""What does Dagster's daemon look after by itself? Dead runs, always; new checkpoints, where that is switched on."""

from collections.abc import Iterator

import dagster as dg

from assets.checkpoints import checkpoint_scores, unscored
from pipeline import instance, runs
from storage.places import places

CHECKPOINT_TAG = "gpt2/checkpoint"
ATTEMPTS = 3  # to score a checkpoint
FAILURE = dg.DagsterRunStatus.FAILURE


@dg.sensor(
    target=None,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Marks as failed the runs whose process on this machine has died, and frees the cards that they held.",
)
def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    swept = instance.sweep(context.instance, places())
    return dg.SkipReason(f"Marked as failed: {', '.join(swept)}" if swept else "Every run that is going on lives.")


@dg.sensor(
    job=checkpoint_scores,
    minimum_interval_seconds=300,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Scores each new checkpoint that a run keeps for good (train.keep_every), once the cards are free.",
)
def new_checkpoints(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
    maker = runs.silent_maker(places())
    for run in {*context.instance.get_dynamic_partitions("run")} & {*runs.readable_runs(maker.places)}:
        for step, made in unscored(maker, run).items():
            checkpoint = {CHECKPOINT_TAG: f"{run}@{step} of {made}"}
            failed = context.instance.get_runs_count(dg.RunsFilter(tags=checkpoint, statuses=[FAILURE]))
            if failed >= ATTEMPTS:
                continue
            yield dg.RunRequest(
                run_key=f"{run}@{step} of {made}, attempt {failed + 1}",  # one that goes on is not asked for twice
                tags=checkpoint,
                partition_key=run,
                run_config={"ops": {"score_checkpoint": {"config": {"step": step}}}},
            )
