"""How does text become tokens: GPT-2's, in uint16 shards that llm.c reads."""

from collections.abc import Callable
from typing import Any

import dagster as dg

from assets.making import Check, Maker, Output, Produced, StageConfig, materialize
from assets.resources import RUNS, Event
from storage import records, shards, tokenizer
from storage.records import Record
from training import tokenization

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
    source = maker.input(context.partition_key, "documents", "documents")
    corpus = source.key.split("/")[1]
    shard_tokens = run.tokenize.shard_tokens
    size = shard_tokens or tokenization.automatic_shard_tokens(source.metrics["text_bytes"])
    output = Output(
        "token_shards",
        f"tokens/{corpus}" + (f"-{shard_tokens}" if shard_tokens else ""),
        VERSION,
        {"shard_tokens": size, "vocabulary": tokenizer.VOCABULARY_SHA256},
        [source],
    )

    def produce(progress: Callable[[Event], None]) -> Produced:
        made = tokenization.tokenize(
            [records.file_url(maker.places.store, source.key, f.path) for f in source.files],
            out=records.folder_url(maker.places.store, output.key),
            corpus=corpus,
            shard_tokens=size,
            work=str(maker.places.home / "work" / output.key),
            workers=run.machine.workers or maker.cores,
            progress=lambda tokens, done, total: progress(
                {"event": "bytes", "done": done, "total": total, "tokens": tokens}
            ),
        )
        metrics = {"shards": made.shards, "shard_tokens": size}
        return Produced(files=made.files, rows=made.documents, tokens=made.tokens, metrics=metrics)

    made, checks = maker.make(config, output, produce, [SHARDS_ARE_WHOLE])
    maker.remember_input(context.partition_key, tokens=output.key)
    return materialize(made, checks, {"shards": made.record.metrics["shards"], "shard_tokens": size})


def validation_shard(maker: Maker, run: str) -> str:
    """The local path of the shard that a run validates on."""
    folder = maker.stage(maker.input(run, "tokens", "token_shards"), suffix="_val_000000.bin")
    return shards.shard_paths(folder, "val")[0]
