"""How do tokens become a model: trained weights, and their export that stock transformers loads."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from assets import shown, trainer
from assets.card import FILE as CARD
from assets.card import write_card
from assets.failures import ProcessFailed
from assets.making import Check, Maker, Output, Produced, StageConfig
from assets.observer import Observer
from assets.resources import POOL, RUNS, Event
from assets.tokens import validation_shard
from evals import report
from storage import checkpoints, objects, records
from storage.records import Record
from training import metrics
from training.config import RunConfig, to_dict
from training.gpus import gpu_count, ranks_here

log = logging.getLogger(__name__)

EXPORT_VERSION = "1"


def _loss_is_finite(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    losses = {name: record.metrics[name] for name in ("loss", "validation_loss_before", "validation_loss_after")}
    return all(math.isfinite(value) for value in losses.values()), losses


def _logits_agree(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    difference, tolerance = record.metrics["max_difference"], record.metrics["tolerance"]
    return difference <= tolerance, {"max_difference": difference, "tolerance": tolerance}


LOSS_IS_FINITE = Check("loss_is_finite", "Training and validation losses are finite numbers.", _loss_is_finite)
LOGITS_AGREE = Check(
    "logits_agree", "Stock transformers gives the logits of the same rounded weights on held-out text.", _logits_agree
)


@dg.asset(
    partitions_def=RUNS,
    group_name="training",
    kinds={"pytorch"},
    code_version=trainer.VERSION,
    deps=["token_shards", "eval_items"],  # of the items, HellaSwag's are scored while training, where it is asked to
    check_specs=[LOSS_IS_FINITE.spec("trained_model")],
    pool=POOL,
)
def trained_model(context: dg.AssetExecutionContext, maker: dg.ResourceParam[Maker]) -> dg.MaterializeResult:
    """Weights after the run's steps; an interrupted training goes on from its newest checkpoint."""
    name = context.partition_key
    run = maker.run_config(name)
    tokens = maker.input(name, "tokens", "token_shards")
    trainer.record_starting_weights(maker, run)
    output = trainer.trained_output(name, run, tokens)

    def produce(progress: Callable[[Event], None]) -> Produced:
        training = maker.trainings.pop(name, None)  # begun while its shards were being made
        if training:
            training.join(context, progress)
        else:
            observer = Observer(context, maker, run)
            trainer.train(maker, name, run, maker.stage(tokens), output, lambda event: observer.see(event, progress))
        return _trained(maker.folder(output.key), run, ranks_here(run.machine.gpus))

    made, checks = maker.make(StageConfig(), output, produce, [LOSS_IS_FINITE])
    folder = maker.stage(made.record, suffix=(".log", ".txt", ".jsonl"))
    return shown.materialize(made, checks, _training_metadata(folder, name, run, made.record))


def _trained(folder: str, run: RunConfig, ranks: int) -> Produced:
    """What a finished run folder holds."""
    steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    log = report.parse_main_log(Path(folder, "main.log").read_text())
    checkpoint = f"{checkpoints.FOLDER}/{checkpoints.step_name(run.train.steps)}"
    useful = sum(step["seconds"] for step in steps)
    ledger = metrics.ledger(Path(folder))
    return Produced(
        paths=[name for name in metrics.LOGS if Path(folder, name).exists()],
        mirrored=[f"{checkpoint}/{s.path}" for s in objects.list_files(objects.join(folder, checkpoint))],
        rows=run.train.steps,
        tokens=run.tokens,
        metrics={
            "parameters": run.model.parameters,
            "loss": next((s["loss"] for s in reversed(steps) if math.isfinite(s["loss"])), math.nan),  # others: skipped
            "validation_loss_before": log.validation[0][1],
            "validation_loss_after": log.validation[-1][1],
            "tokens_per_second": run.tokens / useful,
            "skipped_updates": steps[-1]["skipped"],
        },
        gpus=ranks * run.machine.nnodes if gpu_count() else 0,
        price=run.machine.price_per_gpu_hour,
        seconds=ledger.pop("seconds"),
        ledger=ledger,
    )


def _training_metadata(folder: str, name: str, run: RunConfig, record: Record) -> dict[str, Any]:
    """The numbers, a sample of text, and the curves as pictures."""
    page = report.ReportData(name, to_dict(run), Path(folder, "main.log").read_text())
    log = report.parse_main_log(page.main_log)
    pictures = report.pictures([page], [log])
    sample = Path(folder, "samples.txt").read_text()[-1500:]
    return (
        dict(record.metrics)
        | {name: value for name, value in record.cost.items() if value is not None}
        | {"sample": dg.MetadataValue.md(f"```\n{sample}\n```")}
        | {f"figure_{p.name}": shown.image(p.name, p.png["light"]) for p in pictures}
        | ({"hellaswag": log.accuracy[-1][1]} if log.accuracy else {})
    )


@dg.asset(
    partitions_def=RUNS,
    group_name="training",
    kinds={"huggingface"},
    code_version=EXPORT_VERSION,
    deps=["trained_model"],
    check_specs=[LOGITS_AGREE.spec("hf_model")],
)
def hf_model(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """The model as a Hugging Face folder that stock transformers loads, with the logits of these weights."""
    name = context.partition_key
    run = maker.run_config(name)
    trained = maker.parent(f"runs/{name}", "trained_model")
    output = export_output(name, run, trained)

    def produce(progress: Callable[[Event], None]) -> Produced:
        folder = maker.folder(output.key)
        compared = Path(folder, "export_check.json")
        compared.unlink(missing_ok=True)
        arguments = [maker.stage(trained), "--out", folder, "--dtype", run.evals.dtype]
        try:
            maker.launcher.run("training.export", [*arguments, "--tokens", validation_shard(maker, name)], progress)
        except ProcessFailed:
            if not compared.exists():
                raise  # else the logits differ too much, which is for the check to say
        paths = [s.path for s in objects.list_files(folder) if not s.path.startswith((".", "record.json", CARD))]
        found = json.loads(compared.read_text())
        return Produced(paths=paths, metrics={"parameters": run.model.parameters, **found})

    made, checks = maker.make(config, output, produce, [LOGITS_AGREE])
    if not made.reused and all(check.passed for check in checks):
        write_card(maker, name)
    weights = next(f.path for f in made.record.files if f.path.endswith(".safetensors"))
    tensors = shown.tensors(records.file_url(maker.places.store, made.record.key, weights))
    return shown.materialize(made, checks, dict(made.record.metrics) | tensors)


def export_output(name: str, run: RunConfig, trained: Record) -> Output:
    return Output("hf_model", f"runs/{name}/export", EXPORT_VERSION, {"dtype": run.evals.dtype}, [trained])
