"""How good is the model: one asset a suite, each a process that scores the exported model."""

import math
from collections.abc import Callable
from typing import Any

import dagster as dg

from assets import shown
from assets.asked import Asked, Missing, asked
from assets.making import Check, Made, Maker, Output, Produced, StageConfig
from assets.resources import POOL, RUNS, Event
from storage import objects
from storage.records import Record
from training.gpus import gpu_count

VERSION = "3"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _all_scored(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    wanted, scores = record.metrics["items_wanted"], record.metrics["scores"]
    values = [score["value"] for score in scores.values()]
    passed = record.rows == wanted and bool(values) and all(math.isfinite(v) for v in values)
    return passed, {"items": record.rows or 0, "items_wanted": wanted}


ALL_SCORED = Check("all_scored", "Every item got a score, and every score is a finite number.", _all_scored)


def _suite(name: str, **options: Any) -> Any:
    """The decorator that the assets of the suites share."""
    return dg.asset(
        partitions_def=RUNS,
        group_name="evals",
        kinds={"huggingface", "pytorch"},
        code_version=VERSION,
        check_specs=[ALL_SCORED.spec(name)],
        name=name,
        pool=POOL,
        **options,
    )


@_suite("validation_loss", deps=["hf_model", "token_shards"])
def validation_loss(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Loss and bits per byte of the exported model on the validation shard."""
    return _scored(maker, config, context.partition_key, "validation_loss")


@_suite("completion_demo", deps=["hf_model", "eval_items"])
def completion_demo(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Accuracy on completion items from held-out documents: HellaSwag's format, but not HellaSwag."""
    return _scored(maker, config, context.partition_key, "completion_demo")


@_suite("eleuther", deps=["hf_model", "eval_items"])
def eleuther(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Eleuther's lm-evaluation-harness: the tasks that the run names, else the completion items."""
    return _scored(maker, config, context.partition_key, "eleuther")


@_suite("hellaswag", deps=["hf_model", "eval_items"], output_required=False)
def hellaswag(context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> Any:
    """HellaSwag's validation set, by llm.c's protocol and the harness's; unmade where its items are not at hand."""
    yield _scored(maker, config, context.partition_key, "hellaswag")


@_suite("core", deps=["hf_model"], output_required=False)
def core(context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> Any:
    """DCLM CORE, 22 tasks, centred: GPT-2 grade is .2565; unmade where its data is not at hand."""
    yield _scored(maker, config, context.partition_key, "core")


def _scored(maker: Maker, config: StageConfig, run: str, suite: str) -> Any:
    """Score the run's exported model on a suite, or say why it can't be asked: a warning, which blocks nothing."""
    settings = maker.run_config(run)
    questions = asked(maker, suite, settings.evals, run)
    if isinstance(questions, Missing):
        return dg.AssetCheckResult(
            check_name=ALL_SCORED.name,
            asset_key=suite,
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"Not scored: {questions.reason}.",
        )
    model = maker.parent(f"runs/{run}/export", "hf_model")
    price = settings.machine.price_per_gpu_hour
    made, checks = score(
        maker, config, questions, f"runs/{run}", model, lambda: maker.stage(model), settings.evals.dtype, price
    )
    return shown.materialize(made, checks, shown.scores(made.record.metrics["scores"]))


def score(
    maker: Maker,
    config: StageConfig,
    questions: Asked,
    place: str,
    model: Record,
    folder: Callable[[], str],
    dtype: str = "fp32",
    price: float = 0.0,
) -> tuple[Made, list[dg.AssetCheckResult]]:
    """Ask a model; the answers are kept under `place`/scores. `folder` gives the model's local folder."""
    kind = DTYPES[dtype]
    output = score_output(questions, place, model, dtype)

    def produce(progress: Callable[[Event], None]) -> Produced:
        out = objects.join(maker.folder(output.key), f"{objects.name_of(output.key)}.json")
        maker.launcher.run("evals.run", questions.command(folder(), out, kind), progress)
        return produced(out, questions, price)

    return maker.make(config, output, produce, [ALL_SCORED])


def produced(out: str, questions: Asked, price: float) -> Produced:
    """What evals.run has written to `out`."""
    page = objects.read_json(out)
    wanted = questions.items or page["items_wanted"]
    metrics = {"scores": page["scores"], "items_wanted": wanted, "protocol": page["protocol"]}
    return Produced(
        paths=[objects.name_of(out), page["per_item"]],
        rows=page["items"],
        metrics=metrics | {"truncated": page["truncated"]},
        gpus=min(gpu_count(), 1),
        price=price,
    )


def score_output(questions: Asked, place: str, model: Record, dtype: str) -> Output:
    """A run is asked what its settings say; any other model this and that, so digits of the questions name the key."""
    defining = {"suite": questions.suite, "dtype": DTYPES[dtype]}
    defining |= ({"items": questions.items} if questions.items else {}) | dict(questions.definition)
    name = questions.suite
    if not place.startswith("runs/"):
        name += "-" + Output(name, "", "", defining, questions.reads).fingerprint[:8]
    return Output(questions.suite, f"{place}/scores/{name}", VERSION, defining, [model, *questions.reads])
