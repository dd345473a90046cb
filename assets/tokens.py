"""How does text become tokens: GPT-2's, in uint16 shards that llm.c reads."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import dagster as dg

from assets import shown, trainer
from assets.making import Check, Maker, Output, Produced, StageConfig
from assets.resources import RUNS, Event
from storage import objects, records, shards, tokenizer, verification
from storage.documents import lookup_of
from storage.records import Record
from training import tokenization
from training.config import RunConfig

VERSION = "1"


def _shards_are_whole(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    names = [f.path for f in record.files if f.path.endswith(".bin")]
    validation = sum(shards.is_of(name, "val") for name in names)
    try:
        found = verification.verify(records.folder_url(store, record.key))
    except ValueError as error:
        return False, {"problem": str(error)}
    passed = found.tokens == record.tokens and validation == 1 and found.shards == len(names) > 1
    return passed and found.documents == (record.rows or 0), {"validation_shards": validation, **asdict(found)}


SHARDS_ARE_WHOLE = Check(
    "shards_are_whole",
    "Every shard has its header and length, one of them is for validation, together they hold all tokens and "
    "documents, all token ids are GPT-2's, and sampled documents decode to their text.",
    _shards_are_whole,
)


@dg.asset(
    partitions_def=RUNS,
    group_name="data",
    kinds={"numpy"},
    code_version=VERSION,
    deps=["documents"],
    check_specs=[SHARDS_ARE_WHOLE.spec("token_shards")],
)
def token_shards(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """GPT-2 tokens in uint16 shards: EOT before each document, shard 0 for validation, an index beside each."""
    run = maker.run_config(context.partition_key)
    documents = maker.input(context.partition_key, "documents", "documents")
    output = tokens_output(run, documents, documents.metrics["text_bytes"])
    if documents.metrics["text_bytes"]:
        produce = partial(_tokenize, maker, run, documents, output)
    else:
        produce = partial(_fetch, maker, context.partition_key, output)
    begun = context.partition_key in maker.trainings  # on shards that this job has made while it fetched documents

    def produce_while_training(progress: Callable[[Event], None]) -> Produced:
        if config.recompute and not begun:  # the shards that are there say that they are complete
            objects.remove_tree(records.folder_url(maker.places.store, output.key))
        with trainer.begun_early(context, maker, run, output) as begin:

            def begin_and_tell(event: Event) -> None:
                begin()
                progress(event)

            return produce(begin_and_tell)

    made, checks = maker.make(config, output, produce_while_training, [SHARDS_ARE_WHOLE], together=run.tokenize.shared)
    if not all(check.passed for check in checks):
        trainer.stop_early(maker, context.partition_key)
    maker.remember_input(context.partition_key, tokens=output.key)
    if not made.reused and documents.metrics["text_bytes"]:  # seconds now, for answers in milliseconds later
        lookup_of(maker.places.store, made.record, maker.places.home)
    return shown.materialize(made, checks, dict(made.record.metrics) | _columns(maker, made.record))


def _columns(maker: Maker, record: Record) -> dict[str, Any]:
    """What the index beside each shard says of its documents; shards of others have none."""
    indexes = [f.path for f in record.files if f.path.endswith(".parquet")]
    return shown.parquet_columns(records.file_url(maker.places.store, record.key, indexes[0])) if indexes else {}


def tokens_key(run: RunConfig, corpus: str) -> str:
    asked = run.tokenize.shard_tokens
    return f"tokens/{corpus}" + (f"-{asked}" if asked else "")


def work_folder(maker: Maker, key: str) -> str:
    """Where pieces of the tokens of `key` lie until the shards are cut from them."""
    return str(maker.places.home / "work" / key)


def tokens_output(run: RunConfig, documents: Record | Output, text_bytes: int) -> Output:
    """The shards of a corpus, made here or fetched as they are; a folder's name tells a size that was asked for."""
    if not text_bytes:
        return Output("token_shards", f"tokens/{documents.key.split('/')[1]}", VERSION, {}, [documents])
    size = run.tokenize.shard_tokens or tokenization.automatic_shard_tokens(text_bytes)
    return Output(
        "token_shards",
        tokens_key(run, documents.key.split("/")[1]),
        VERSION,
        {"shard_tokens": size, "vocabulary": tokenizer.VOCABULARY_SHA256},
        [documents],
    )


def _tokenize(
    maker: Maker, run: RunConfig, documents: Record, output: Output, progress: Callable[[Event], None]
) -> Produced:
    size = output.config["shard_tokens"]
    pace = Pace(progress)
    made = tokenization.tokenize(
        [records.file_url(maker.places.store, documents.key, f.path) for f in documents.files],
        out=records.folder_url(maker.places.store, output.key),
        corpus=documents.key.split("/")[1],
        shard_tokens=size,
        work=work_folder(maker, output.key),
        workers=run.machine.workers or maker.cores,
        progress=pace.tell,
        engine_name=run.tokenize.engine,
        shared=run.tokenize.shared,
        root=maker.places.store,
    )
    metrics = {"shards": made.shards, "shard_tokens": size, "validation_tokens": size}
    return Produced(files=made.files, rows=made.documents, tokens=made.tokens, metrics=metrics)


class Pace:
    """Tells how far the tokens are, and how many a second this process has seen made."""

    def __init__(self, progress: Callable[[Event], None]):
        self.progress, self.first, self.since = progress, -1, time.monotonic()

    def tell(self, tokens: int, done: int, total: int) -> None:
        self.first = tokens if self.first < 0 else self.first
        rate = (tokens - self.first) / max(time.monotonic() - self.since, 1e-3)
        event = {"event": "bytes", "done": done, "total": total, "tokens": tokens, "tokens_per_second": rate}
        self.progress(event)


def _fetch(maker: Maker, run: str, output: Output, progress: Callable[[Event], None]) -> Produced:
    """Shards that somebody else has made, as they are; whoever reads them meanwhile is told when the last is there."""
    out = records.folder_url(maker.places.store, output.key)
    source = maker.source(run)
    if objects.exists(complete := objects.join(out, shards.COMPLETE)):
        objects.remove(complete)
    objects.publish_json(objects.join(out, shards.PLAN), source.identity)
    files = source.fetch(
        out,
        lambda done, total: progress({"event": "bytes", "done": done, "total": total}),
        scratch=str(maker.places.home / "downloads" / output.key),
    )
    objects.publish_json(complete, [f.path for f in files])
    counts = {f.path: shards.read_header(objects.join(out, f.path)) for f in files}
    metrics = {
        "shards": len(files),
        "shard_tokens": max(counts.values()),
        "validation_tokens": sum(n for path, n in counts.items() if shards.is_of(path, "val")),
    }
    return Produced(files=files, tokens=sum(counts.values()), metrics=metrics)


def validation_shard(maker: Maker, run: str) -> str:
    """The local path of the shard that a run validates on."""
    folder = maker.stage(maker.input(run, "tokens", "token_shards"), suffix="_val_000000.bin")
    return shards.shard_paths(folder, "val")[0]
