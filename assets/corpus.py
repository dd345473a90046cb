"""Which texts does a run read: the documents it trains on, and the items it is asked."""

from collections.abc import Callable
from typing import Any

import dagster as dg

from assets import shown
from assets.ahead import tokenized_ahead
from assets.items import ITEMS_VERSION, hellaswag_items
from assets.making import Check, Maker, Output, Produced, StageConfig, chosen
from assets.repeats import check_new
from assets.resources import RUNS, Event, NewRun
from assets.run_config import check_documents, documents_key, source_of
from assets.tokens import validation_shard
from evals import completion_items
from storage import hub, items, objects, parquet, records, sources
from storage.records import Record
from training.config import EvalConfig, RunConfig, from_dict

DOCUMENTS_VERSION = "1"
ITEMS_SEED = 42
LEAST_ITEMS = 4


def _items_are_whole(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    try:
        found = items.read_items(records.file_url(store, record.key, items.FILES[0]))
    except ValueError as error:
        return False, {"problem": str(error)}
    return len(found) >= LEAST_ITEMS, {"rows": len(found)}


def _has_rows(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    return bool(record.rows), {"rows": record.rows or 0}


HAS_DOCUMENTS = Check("has_documents", "There is at least one document (or shard that is fetched).", _has_rows)
HAS_ITEMS = Check(
    "has_items", f"At least {LEAST_ITEMS} items, each with a context, its endings and a label.", _items_are_whole
)


@dg.asset(
    partitions_def=RUNS,
    group_name="data",
    kinds={"parquet", "huggingface"},
    code_version=DOCUMENTS_VERSION,
    check_specs=[HAS_DOCUMENTS.spec("documents")],
)
def documents(
    context: dg.AssetExecutionContext,
    config: StageConfig,
    maker: dg.ResourceParam[Maker],
    new_run: dg.ResourceParam[NewRun],
) -> dg.MaterializeResult:
    """The documents of the run's corpus: parquet in FineWeb-Edu's columns, in corpus order."""
    if new_run.config is not None:
        _define(context, maker, from_dict(RunConfig, new_run.config))
    source = maker.source(context.partition_key)
    output = documents_output(source)

    def produce(progress: Callable[[Event], None]) -> Produced:
        if source.kind == "tokens":  # there is no text: the shards are fetched where the tokens go
            return Produced(rows=len(source.identity["files"]), metrics={"text_bytes": 0, **source.details})
        folder = records.folder_url(maker.places.store, output.key)
        with tokenized_ahead(context, maker, source, output, progress) as tell:
            files = source.fetch(folder, tell, scratch=str(maker.places.home / "downloads" / source.name))
        urls = [records.file_url(maker.places.store, output.key, f.path) for f in files]
        rows = sum(parquet.read_metadata(url).num_rows for url in urls)
        text_bytes = parquet.total_text_bytes(urls)
        return Produced(files=files, rows=rows, metrics={"text_bytes": text_bytes, **source.details})

    made, checks = maker.make(config, output, produce, [HAS_DOCUMENTS])
    maker.remember_input(context.partition_key, documents=output.key)
    columns = {} if source.kind == "tokens" else shown.parquet_columns(_first_file(maker, made.record))
    return shown.materialize(made, checks, columns | dict(source.details))


def _define(context: dg.AssetExecutionContext, maker: Maker, run: RunConfig) -> None:
    name, retry = context.partition_key, context.run.parent_run_id is not None
    source = source_of(maker.places, name, run.corpus)
    if chosen(context, "trained_model"):
        check_new(maker, name, run, documents_output(source))
    check_documents(maker.places, name, source)
    maker.define(name, run, retry)


@dg.asset(
    partitions_def=RUNS,
    group_name="data",
    kinds={"json"},
    code_version=ITEMS_VERSION,
    deps=["token_shards"],
    check_specs=[HAS_ITEMS.spec("eval_items")],
)
def eval_items(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Items to complete, made from documents held out in the validation shard; HellaSwag's where it is at hand."""
    run = maker.run_config(context.partition_key)
    missing = _make_hellaswag(maker, config, run)
    output = completion_output(maker, context.partition_key, run.evals)

    def produce(progress: Callable[[Event], None]) -> Produced:
        texts = completion_items.held_out_documents(validation_shard(maker, context.partition_key))
        made = completion_items.make_items(texts, run.evals.completion_items, ITEMS_SEED)
        out = records.folder_url(maker.places.store, output.key)
        return Produced(files=items.write_items(made, out), rows=len(made))

    made, checks = maker.make(config, output, produce, [HAS_ITEMS])
    columns = shown.json_columns(_first_file(maker, made.record))
    return shown.materialize(made, checks, {"hellaswag": missing or run.evals.hellaswag} | columns)


def _make_hellaswag(maker: Maker, config: StageConfig, run: RunConfig) -> str:
    """Make HellaSwag's items -> why there are none. A machine without a network goes on without them, and says so."""
    if not run.evals.hellaswag:
        return "no items: set evals.hellaswag=FILE"
    try:
        hellaswag_items(maker, config, run.evals)
    except hub.Unreachable as error:
        if run.train.hellaswag:
            raise
        maker.listener.progressed("eval_items", {"event": "warning", "message": f"no HellaSwag: {error}"})
        return f"no items: {error}"
    return ""


def _first_file(maker: Maker, record: Record) -> str:
    return records.file_url(maker.places.store, record.key, record.files[0].path)


def documents_output(source: sources.Source) -> Output:
    return Output("documents", documents_key(source), DOCUMENTS_VERSION, source.identity)


def completion_output(maker: Maker, name: str, settings: EvalConfig) -> Output:
    """The demo's items, by the shards that they are made from."""
    tokens = maker.input(name, "tokens", "token_shards")
    return Output(
        "eval_items",
        f"eval_items/completion_demo-{objects.name_of(tokens.key)}-{settings.completion_items}",
        ITEMS_VERSION,
        {"suite": "completion_demo", "items": settings.completion_items, "seed": ITEMS_SEED},
        [tokens],
    )
