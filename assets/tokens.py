"""How does text become tokens: GPT-2's, in uint16 shards that llm.c reads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import dagster as dg

from assets.making import Check, Maker, Output, Produced, StageConfig, materialize
from assets.resources import RUNS, Event
from storage import objects, records, shards, sources, tokenizer
from storage.records import Record
from training import tokenization
from training.config import RunConfig

VERSION = "1"


def _shards_are_whole(record: Record, store: str) -> tuple[bool, dict[str, Any]]:
    names = [f.path for f in record.files if f.path.endswith(".bin")]
    counts = [shards.read_header(records.file_url(store, record.key, name)) for name in names]
    validation = sum("_val_" in name for name in names)
    passed = sum(counts) == record.tokens and validation == 1 and len(names) > 1
    return passed, {"shards": len(names), "validation_shards": validation, "tokens": sum(counts)}


SHARDS_ARE_WHOLE = Check(
    "shards_are_whole",
    "Every shard has its header and length, one of them is for validation, and together they hold all tokens.",
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
    output = tokens_output(run, documents)
    if documents.metrics["text_bytes"]:
        produce = partial(_tokenize, maker, run, documents, output)
    else:
        produce = partial(_fetch, maker, run, output)
    if config.recompute:  # the shards that are there say that they are complete
        objects.remove_tree(records.folder_url(maker.places.store, output.key))
    made, checks = maker.make(config, output, produce, [SHARDS_ARE_WHOLE])
    maker.remember_input(context.partition_key, tokens=output.key)
    return materialize(made, checks, dict(made.record.metrics))


def tokens_output(run: RunConfig, documents: Record) -> Output:
    """The shards of a corpus, made here or fetched as they are; a folder's name tells a size that was asked for."""
    if not documents.metrics["text_bytes"]:
        return Output("token_shards", f"tokens/{documents.key.split('/')[1]}", VERSION, {}, [documents])
    asked = run.tokenize.shard_tokens
    size = asked or tokenization.automatic_shard_tokens(documents.metrics["text_bytes"])
    return Output(
        "token_shards",
        f"tokens/{documents.key.split('/')[1]}" + (f"-{asked}" if asked else ""),
        VERSION,
        {"shard_tokens": size, "vocabulary": tokenizer.VOCABULARY_SHA256},
        [documents],
    )


def _tokenize(
    maker: Maker, run: RunConfig, documents: Record, output: Output, progress: Callable[[Event], None]
) -> Produced:
    size = output.config["shard_tokens"]
    made = tokenization.tokenize(
        [records.file_url(maker.places.store, documents.key, f.path) for f in documents.files],
        out=records.folder_url(maker.places.store, output.key),
        corpus=documents.key.split("/")[1],
        shard_tokens=size,
        work=str(maker.places.home / "work" / output.key),
        workers=run.machine.workers or maker.cores,
        progress=lambda tokens, done, total: progress(
            {"event": "bytes", "done": done, "total": total, "tokens": tokens}
        ),
        engine_name=run.tokenize.engine,
        shared=run.tokenize.shared,
        root=maker.places.store,
    )
    metrics = {"shards": made.shards, "shard_tokens": size, "validation_tokens": size}
    return Produced(files=made.files, rows=made.documents, tokens=made.tokens, metrics=metrics)


def _fetch(maker: Maker, run: RunConfig, output: Output, progress: Callable[[Event], None]) -> Produced:
    """Shards that somebody else has made, as they are."""
    files = sources.resolve(run.corpus).fetch(
        records.folder_url(maker.places.store, output.key),
        lambda done, total: progress({"event": "bytes", "done": done, "total": total}),
        scratch=str(maker.places.home / "downloads" / output.key),
    )
    counts = {f.path: shards.read_header(records.file_url(maker.places.store, output.key, f.path)) for f in files}
    metrics = {
        "shards": len(files),
        "shard_tokens": max(counts.values()),
        "validation_tokens": sum(n for path, n in counts.items() if "_val_" in path),
    }
    return Produced(files=files, tokens=sum(counts.values()), metrics=metrics)


def validation_shard(maker: Maker, run: str) -> str:
    """The local path of the shard that a run validates on."""
    folder = maker.stage(maker.input(run, "tokens", "token_shards"), suffix="_val_000000.bin")
    return shards.shard_paths(folder, "val")[0]
