"""How good is the model: one asset a suite, each a process that scores the exported model."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dagster as dg

from assets.corpus import completion_output, hellaswag_output
from assets.making import Check, Made, Maker, Output, Produced, StageConfig, materialize
from assets.resources import RUNS, Event
from assets.tokens import validation_shard
from evals.run import HARNESS_SUITES
from storage import objects
from storage.items import FILES
from storage.records import Record
from training import launch
from training.config import EvalConfig

VERSION = "1"


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
        kinds={"huggingface"},
        code_version=VERSION,
        check_specs=[ALL_SCORED.spec(name)],
        name=name,
        pool="gpu",
        **options,
    )


@_suite("validation_loss", deps=["hf_model", "token_shards"])
def validation_loss(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Loss and bits per byte of the exported model on the validation shard."""
    run = context.partition_key
    tokens = maker.input(run, "tokens", "token_shards")
    windows = (tokens.metrics["validation_tokens"] - 1) // maker.run_config(run).model.context
    arguments = ["--suite", "validation_loss", "--shard"]
    return _score(
        maker, config, run, "validation_loss", [tokens], lambda: [*arguments, validation_shard(maker, run)], windows
    )


@_suite("completion_demo", deps=["hf_model", "eval_items"])
def completion_demo(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Accuracy on completion items from held-out documents: HellaSwag's format, but not HellaSwag."""
    run = context.partition_key
    items = _completion_items(maker, run)
    asked = partial(_on_items, maker, items, "completion_demo")
    return _score(maker, config, run, "completion_demo", [items], asked, items.rows)


@_suite("eleuther", deps=["hf_model", "eval_items"])
def eleuther(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Eleuther's lm-evaluation-harness: the tasks that the run names, else the completion items."""
    run = context.partition_key
    settings = maker.run_config(run).evals
    if settings.harness in HARNESS_SUITES:
        return _score(maker, config, run, "eleuther", [], lambda: ["--suite", settings.harness], None, _tasks(settings))
    if settings.harness:
        arguments = ["--suite", "eleuther", "--tasks", settings.harness]
        return _score(maker, config, run, "eleuther", [], lambda: arguments, None, _tasks(settings))
    items = _completion_items(maker, run)
    limit = min(settings.harness_items, items.rows or 0)
    asked = partial(_on_items, maker, items, "eleuther", limit)
    return _score(maker, config, run, "eleuther", [items], asked, limit)


def _tasks(settings: EvalConfig) -> dict[str, Any]:
    return {"tasks": settings.harness}


@_suite("hellaswag", deps=["hf_model", "eval_items"], output_required=False)
def hellaswag(context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> Any:
    """HellaSwag's validation set, by llm.c's protocol and the harness's; unmade where its items are not at hand."""
    run = context.partition_key
    settings = maker.run_config(run)
    if settings.evals.hellaswag:
        items = maker.parent(hellaswag_output(settings).key, "eval_items")
        asked = partial(_on_items, maker, items, "hellaswag")
        yield _score(maker, config, run, "hellaswag", [items], asked, items.rows)
    else:
        yield _not_scored("hellaswag", "no items are configured: set evals.hellaswag to a file, or to hub")


@_suite("core", deps=["hf_model"], output_required=False)
def core(context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> Any:
    """DCLM CORE, 22 tasks, centred: GPT-2 grade is .2565; unmade where its data is not at hand."""
    run = context.partition_key
    folder = maker.run_config(run).evals.core
    if folder:
        yield _score(maker, config, run, "core", [], lambda: ["--suite", "core", "--bundle", folder])
    else:
        yield _not_scored("core", "no data is configured: set evals.core to a folder")


def _not_scored(suite: str, reason: str) -> dg.AssetCheckResult:
    """Not scored is not passed; a warning blocks nothing."""
    return dg.AssetCheckResult(
        check_name=ALL_SCORED.name,
        asset_key=suite,
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"Not scored: {reason}.",
    )


def _completion_items(maker: Maker, run: str) -> Record:
    return maker.parent(completion_output(maker, run, maker.run_config(run)).key, "eval_items")


def _on_items(maker: Maker, items: Record, suite: str, limit: int = 0) -> list[str]:
    return ["--suite", suite, "--items", objects.join(maker.stage(items), FILES[0]), "--limit", str(limit)]


def _score(
    maker: Maker,
    config: StageConfig,
    run: str,
    suite: str,
    reads: Sequence[Record],
    arguments: Callable[[], list[str]],
    items: int | None = None,
    definition: dict[str, Any] | None = None,
) -> dg.MaterializeResult:
    """Score the exported model on a suite that reads outputs; `items`: how many it must score, where that is known."""
    model = maker.parent(f"runs/{run}/export", "hf_model")
    settings = maker.run_config(run)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[settings.evals.dtype]
    defining = {"suite": suite, "dtype": dtype} | ({"items": items} if items else {}) | (definition or {})
    output = Output(suite, f"runs/{run}/scores/{suite}", VERSION, defining, [model, *reads])

    def produce(progress: Callable[[Event], None]) -> Produced:
        out = objects.join(maker.folder(output.key), f"{suite}.json")
        maker.launcher.run(
            "evals.run",
            [maker.stage(model), "--out", out, "--dtype", dtype, *arguments()],
            progress,
        )
        page = objects.read_json(out)
        metrics = {"scores": page["scores"], "items_wanted": items or page["items"], "protocol": page["protocol"]}
        return Produced(
            paths=[f"{suite}.json", page["per_item"]],
            rows=page["items"],
            metrics=metrics | {"truncated": page["truncated"]},
            gpus=min(launch.gpu_count(), 1),
            price=settings.machine.price_per_gpu_hour,
        )

    made, checks = maker.make(config, output, produce, [ALL_SCORED])
    return materialize(made, checks, _score_metadata(made))


def _score_metadata(made: Made) -> dict[str, Any]:
    scores = made.record.metrics["scores"]
    lines = ["| score | value | ± | items |", "|---|---|---|---|"]
    for name, score in scores.items():
        error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
        lines.append(f"| {name} | {score['value']:.4f} | {error} | {score['n']} |")
    table = {"scores": dg.MetadataValue.md("\n".join(lines))}
    return table | {name: score["value"] for name, score in scores.items()}
