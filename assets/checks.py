"""What stands in a run's corpus? Checks that warn, of the eval items in it, its duplicates and its lengths.

They take as long as reading the corpus does, so they come after the training, and what they find is kept beside the
tokens: runs on one corpus and the same items share it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.corpus import completion_output
from assets.items import hellaswag_at_hand
from assets.making import Check, Maker, Output, Produced, StageConfig
from assets.resources import RUNS, Event
from assets.shown import materialize
from evals import core_bundle
from storage import inspection, items, objects, records, shards
from storage.items import FILES
from storage.records import Record
from training.config import RunConfig
from training.workers import process_pool

VERSION = "2"
PAGE = "inspection.json"
MOST_EXACT, MOST_NEAR = 0.01, 0.05  # shares of documents that stood in the corpus before
MOST_HELD_OUT = 0.5  # share of held-out documents with 13 words in a row of another: a common sentence is enough
AFTER_TRAINING = {"dagster/priority": "-1"}  # nothing but the report waits for it


def _items_are_absent(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    found = record.metrics
    names = ("items", "contaminated_items", "documents_with_items", "too_short_items")
    shown = {name: found[name] for name in names}
    return not found["contaminated_items"], shown | {f"{s}_items": n["items"] for s, n in found["suites"].items()}


def _documents_are_distinct(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    found = record.metrics
    exact = found["exact_duplicates"] / max(found["documents"], 1)
    names = ("documents", "exact_duplicates", "near_duplicates_share", "compared_documents")
    return exact <= MOST_EXACT and found["near_duplicates_share"] <= MOST_NEAR, {name: found[name] for name in names}


def _validation_is_held_out(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    held, there = record.metrics["validation_documents"], record.metrics["validation_documents_in_training"]
    share = there / max(held, 1)
    return share <= MOST_HELD_OUT, {"validation_documents": held, "in_training": there, "share": round(share, 4)}


def _documents_have_tokens(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    sizes = {name: n for name, n in record.metrics.items() if name.startswith("tokens_a_document_")}
    return sizes["tokens_a_document_median"] > 1, {"tokens": record.metrics["tokens"], **sizes}


CHECKS = [
    Check(
        "eval_items_are_absent",
        "No eval item (context and right ending) shares 13 words in a row with a training document.",
        _items_are_absent,
        blocking=False,
    ),
    Check(
        "documents_are_distinct",
        f"At most {MOST_EXACT:.0%} of the documents stand there twice, and {MOST_NEAR:.0%} nearly (MinHash).",
        _documents_are_distinct,
        blocking=False,
    ),
    Check(
        "validation_is_held_out",
        f"At most {MOST_HELD_OUT:.0%} of the validation documents share 13 words in a row with a training document.",
        _validation_is_held_out,
        blocking=False,
    ),
    Check(
        "documents_have_tokens",
        "Half of the documents or more hold text; how long they are.",
        _documents_have_tokens,
        blocking=False,
    ),
]


@dg.asset(
    name="inspection",
    partitions_def=RUNS,
    group_name="checks",
    kinds={"duckdb"},
    code_version=VERSION,
    deps=["documents", "token_shards", "eval_items"],
    check_specs=[check.spec("inspection") for check in CHECKS],
    op_tags=AFTER_TRAINING,
)
def inspected(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """What stands in the corpus: eval items, duplicates, held-out documents, lengths, tokens by crawl."""
    name = context.partition_key
    run = maker.run_config(name)
    documents, tokens = _corpus(maker, name)
    asked, core = _items(maker, name, run), core_items(run)
    output = inspection_output(maker, name, run, core)

    def produce(progress: Callable[[Event], None]) -> Produced:
        texts = [text for suite, record in asked.items() for text in _texts(maker, record, suite)] + core
        files = _files(maker, documents, tokens)
        folder = records.folder_url(maker.places.store, tokens.key)
        with process_pool(min(run.machine.workers or maker.cores, len(files))) as pool:
            found = inspection.inspect(
                files,
                folder,
                texts,
                pool.submit,
                lambda done, total: progress({"event": "parts", "done": done, "total": total}),
            )
        suites = inspection.by_suite(found.contamination, texts)
        out = records.folder_url(maker.places.store, output.key)
        objects.publish_json(objects.join(out, PAGE), {"suites": suites, **asdict(found)})
        metrics = {"suites": suites, **inspection.numbers(found)}
        return Produced(files=[records.describe_file(out, PAGE)], rows=found.lengths.documents, metrics=metrics)

    made, checks = maker.make(config, output, produce, CHECKS)
    maker.remember_input(name, inspection=output.key)
    return materialize(made, checks, _examples(maker, made.record) | dict(made.record.metrics))


def inspection_output(maker: Maker, name: str, run: RunConfig, core: Sequence[tuple[str, str]]) -> Output:
    """Beside the tokens, in a folder for each set of items; `core` are CORE's."""
    documents, tokens = _corpus(maker, name)
    items = list(_items(maker, name, run).values())
    asked = hashlib.sha256(repr(([item.fingerprint for item in items], core)).encode()).hexdigest()
    definition = {"core_sha256": hashlib.sha256(repr(core).encode()).hexdigest()} if core else {}
    key = f"{tokens.key}/inspection-{asked[:8]}"
    return Output("inspection", key, VERSION, definition, [documents, tokens, *items])


def _corpus(maker: Maker, name: str) -> tuple[Record, Record]:
    return maker.input(name, "documents", "documents"), maker.input(name, "tokens", "token_shards")


def _items(maker: Maker, name: str, run: RunConfig) -> dict[str, Record]:
    """The eval items at hand, by suite."""
    found = {"completion_demo": maker.parent(completion_output(maker, name, run.evals).key, "eval_items")}
    hellaswag = hellaswag_at_hand(maker, run.evals)
    return found | ({"hellaswag": hellaswag} if hellaswag else {})


def core_items(run: RunConfig) -> list[tuple[str, str]]:
    """The items of CORE's bundle, where that needs no network."""
    folder = run.evals.core
    return items.core_texts(core_bundle.bundle(folder)) if folder and core_bundle.is_there(folder) else []


def _texts(maker: Maker, record: Record, suite: str) -> list[tuple[str, str]]:
    return inspection.item_texts(items.read_items(records.file_url(maker.places.store, record.key, FILES[0])), suite)


def _files(maker: Maker, documents: Record, tokens: Record) -> list[str]:
    """The corpus's parquet files; where there is no text, the training shards."""
    store = maker.places.store
    if documents.metrics["text_bytes"]:
        return [records.file_url(store, documents.key, f.path) for f in documents.files]
    return shards.shard_paths(records.folder_url(store, tokens.key), "train")


def _examples(maker: Maker, record: Record) -> dict[str, Any]:
    """Overlaps as a table, where there are any."""
    page = objects.read_json(records.file_url(maker.places.store, record.key, PAGE))
    found = [*page["contamination"]["examples"], *page["validation"]["examples"]]
    lines = [f"| {e['item']} | {e['document']} | {e['words']} |" for e in found]
    table = "\n".join(["| item | training document | words in common |", "|---|---|---|", *lines])
    return {"overlaps": dg.MetadataValue.md(table)} if found else {}
