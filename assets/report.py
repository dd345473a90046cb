"""What came of the run, on one page: curves, scores, lineage, samples and cost."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.baselines import Beside, baseline, beside, items, page
from assets.card import outputs_of, with_ancestors, write_card
from assets.checks import PAGE
from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import RUNS, Event
from assets.samples import read as read_samples
from assets.shown import describe, image
from evals import report as pages
from storage import objects, records
from storage.records import Record
from training.config import SUITES, to_dict

VERSION = "5"


@dg.op(ins={"scores": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), code_version=VERSION)
def write_report(context: dg.OpExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]) -> None:
    """One self-contained page and its figures."""
    run = context.partition_key
    parts = outputs_of(maker, run)
    others = beside(maker, run, parts)
    output = report_output(run, parts, others)

    def produce(progress: Callable[[Event], None]) -> Produced:
        folder = maker.folder(output.key)
        write_card(maker, run)  # the model's, with the scores that are there now
        made = pages.build(report_data(maker, run, parts, others), folder)
        return Produced(paths=[url.removeprefix(folder).lstrip("/") for url in made.files])

    made, _ = maker.make(config, output, produce)
    context.add_output_metadata(_figures(maker.stage(made.record)) | describe(made))


def report_output(run: str, parts: Sequence[Record], others: Sequence[Beside]) -> Output:
    compared = [score for other in others for score in other.scores]
    return Output("report", f"runs/{run}/report", VERSION, {}, [*parts, *compared])


@dg.op(ins={"score": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def scored() -> None:
    """A suite is done."""


@dg.graph_asset(
    partitions_def=RUNS,
    group_name="evals",
    kinds={"html"},
    ins={name: dg.AssetIn(dagster_type=dg.Nothing) for name in (*SUITES, "samples", "inspection")},
)
def report(
    validation_loss: Any,
    hellaswag: Any,
    completion_demo: Any,
    eleuther: Any,
    core: Any,
    samples: Any,
    inspection: Any,
) -> Any:
    """One self-contained page and its figures. It waits for all, and is made without an unmade one."""
    # Dagster passes a step over when the source of one of its inputs was, as HellaSwag and CORE may be. The suites
    # are fanned in as one input instead, which is passed over only when all of them are.
    suites = {
        "validation_loss": validation_loss,
        "hellaswag": hellaswag,
        "completion_demo": completion_demo,
        "eleuther": eleuther,
        "core": core,
        "samples": samples,
        "inspection": inspection,
    }
    return write_report(scores=[scored.alias(f"{name}_done")(suite) for name, suite in suites.items()])


def report_data(maker: Maker, run: str, outputs: Sequence[Record], others: Sequence[Beside] = ()) -> pages.ReportData:
    """A run as plain data: its logs, scores and samples, the records of all that it stands on, and its baselines."""
    store = maker.places.store
    folder = records.folder_url(store, f"runs/{run}")
    scores = {r.asset: r for r in outputs if r.asset in SUITES}
    metrics = objects.read_text(objects.join(folder, "metrics.jsonl"))
    return pages.ReportData(
        name=run,
        config=to_dict(maker.run_config(run)),
        main_log=objects.read_text(objects.join(folder, "main.log")),
        metrics=[json.loads(line) for line in metrics.splitlines()],
        scores={name: page(store, score) for name, score in scores.items()},
        items={name: items(store, score) for name, score in scores.items()},
        samples=objects.read_text(objects.join(folder, "samples.txt")),
        unicorns="".join(read_samples(maker, r) for r in outputs if r.asset == "samples"),
        inspection=_inspection(maker, outputs),
        records=[asdict(record) for record in with_ancestors(maker, outputs)],
        baselines=[baseline(store, other) for other in others],
    )


def _inspection(maker: Maker, outputs: Sequence[Record]) -> dict[str, Any]:
    """What stands in the run's corpus; empty where nobody has looked."""
    for record in outputs:
        if record.asset == "inspection":
            return dict(objects.read_json(records.file_url(maker.places.store, record.key, PAGE)))
    return {}


def _figures(folder: str) -> dict[str, Any]:
    """The light figures, embedded, so that the asset's page shows them."""
    shown: dict[str, Any] = {"page": dg.MetadataValue.path(objects.join(folder, "index.html"))}
    for found in objects.list_files(folder, "-light.png"):
        name = found.path.removesuffix("-light.png")
        shown[f"figure_{name}"] = image(name, objects.read_bytes(objects.join(folder, found.path)))
    return shown
