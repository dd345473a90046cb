"""How good is the model: one asset a suite, each a process that scores the exported model."""

import math
from collections.abc import Callable
from typing import Any

import dagster as dg

from assets.corpus import ITEMS_FILE, completion_output, hellaswag_output
from assets.making import Check, Made, Maker, Output, Produced, StageConfig, materialize
from assets.resources import RUNS, Event
from assets.tokens import validation_shard
from storage import objects
from storage.records import Record

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
    return _score(maker, config, run, "validation_loss", tokens, lambda: ["--shard", validation_shard(maker, run)])


@_suite("completion_demo", deps=["hf_model", "eval_items"])
def completion_demo(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Accuracy on completion items from held-out documents: HellaSwag's format, but not HellaSwag."""
    run = context.partition_key
    items = _completion_items(maker, run)
    return _score(maker, config, run, "completion_demo", items, lambda: _items_arguments(maker, items), items.rows)


@_suite("eleuther", deps=["hf_model", "eval_items"])
def eleuther(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """The same items through Eleuther's lm-evaluation-harness."""
    run = context.partition_key
    items = _completion_items(maker, run)
    limit = min(maker.run_config(run).evals.harness_items, items.rows or 0)
    return _score(
        maker,
        config,
        run,
        "eleuther",
        items,
        lambda: [*_items_arguments(maker, items), "--limit", str(limit)],
        limit,
    )


@_suite("hellaswag", deps=["hf_model", "eval_items"], output_required=False)
def hellaswag(context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> Any:
    """HellaSwag's validation set, by llm.c's protocol and the harness's; unmade where its items are not at hand."""
    run = context.partition_key
    settings = maker.run_config(run)
    if not settings.evals.hellaswag:
        # Not scored is not passed; a warning blocks nothing.
        yield dg.AssetCheckResult(
            check_name=ALL_SCORED.name,
            asset_key="hellaswag",
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description="Not scored: no items are configured (set evals.hellaswag=FILE).",
        )
        return
    items = maker.parent(hellaswag_output(settings).key, "eval_items")
    yield _score(maker, config, run, "hellaswag", items, lambda: _items_arguments(maker, items), items.rows)


def _completion_items(maker: Maker, run: str) -> Record:
    return maker.parent(completion_output(maker, run, maker.run_config(run)).key, "eval_items")


def _items_arguments(maker: Maker, items: Record) -> list[str]:
    return ["--items", objects.join(maker.stage(items), ITEMS_FILE)]


def _score(
    maker: Maker,
    config: StageConfig,
    run: str,
    suite: str,
    reads: Record,
    arguments: Callable[[], list[str]],
    items: int | None = None,
) -> dg.MaterializeResult:
    """Score the run's exported model on a suite that reads the output `reads`; `items`: how many it must score."""
    model = maker.parent(f"runs/{run}/export", "hf_model")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[maker.run_config(run).evals.dtype]
    definition = {"suite": suite, "dtype": dtype} | ({"items": items} if items else {})
    output = Output(suite, f"runs/{run}/scores/{suite}", VERSION, definition, [model, reads])

    def produce(progress: Callable[[Event], None]) -> Produced:
        out = objects.join(maker.folder(output.key), f"{suite}.json")
        maker.launcher.run(
            "evals.run",
            [maker.stage(model), "--suite", suite, "--out", out, "--dtype", dtype, *arguments()],
            progress,
        )
        page = objects.read_json(out)
        metrics = {
            "scores": page["scores"],
            "items_wanted": items or page["items"],
            "protocol": page["protocol"],
        }
        return Produced(paths=[f"{suite}.json", page["per_item"]], rows=page["items"], metrics=metrics)

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
