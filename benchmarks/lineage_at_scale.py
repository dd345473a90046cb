"""How fast does the lineage answer for 10B tokens? A simulated index of 10M documents, asked through the CLI.

    python benchmarks/lineage_at_scale.py FOLDER [--shards 101] [--documents 100000] [--tokens 100000000]

Builds a store in FOLDER (about 1.5 GB; kept, and used again by the next call) with the records of a run, a metrics
line for each of its 19,000 steps, an index of documents beside each shard in FineWeb-Edu's shapes (ids are random
UUIDs, urls are long), and shards that are holes of the right size. Prints each command's seconds, start included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects, records, shards
from storage.records import File, Parent, Record
from storage.shards import index_name
from training import recipes
from training.config import RunConfig, to_dict
from training.pieces import INDEX_SCHEMA

CORPUS, RUN = "fineweb-edu-10B-simulated", "simulated"
DOCUMENTS, TOKENS = f"corpora/{CORPUS}/documents", f"tokens/{CORPUS}"
WORDS = np.array(["guide", "history", "science", "learning", "river", "planet", "energy", "reading", "number"])


def build(store: str, count: int, documents: int, tokens: int) -> None:
    """A store with `count` shards of `tokens` tokens and `documents` documents each."""
    folder = Path(store, TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(count):
        name = shards.shard_name(CORPUS, shards.split_of(index), index)
        with open(folder / name, "wb") as f:
            f.write(shards.header(shards.MAGIC, tokens))
            f.truncate(shards.HEADER_BYTES + 2 * tokens)
        pq.write_table(_index(index, documents, tokens), folder / index_name(name), compression="zstd")
        files += [_file(folder / name), _file(folder / index_name(name))]
        print(f"\r{index + 1}/{count} shards", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    _records(store, files, count, documents, tokens)


def _index(shard: int, documents: int, tokens: int) -> pa.Table:
    draw = np.random.default_rng(shard)
    raw = draw.bytes(16 * documents).hex()
    ids = [raw[at : at + 32] for at in range(0, 32 * documents, 32)]
    topics = WORDS[draw.integers(0, len(WORDS), (documents, 3))]
    cuts = np.sort(draw.choice(np.arange(1, tokens), documents - 1, replace=False))
    starts = np.concatenate([[0], cuts])
    return pa.table(
        {
            "id": [f"<urn:uuid:{i[:8]}-{i[8:12]}-{i[12:16]}-{i[16:20]}-{i[20:]}>" for i in ids],
            "url": [
                f"https://www.{i[:9]}.org/{a}/{b}/the-{c}-of-{i[9:17]}"
                for i, (a, b, c) in zip(ids, topics, strict=True)
            ],
            "dump": ["CC-MAIN-2024-10"] * documents,
            "file": [f"{DOCUMENTS}/{shard // 8:03d}_00000.parquet"] * documents,
            "row": np.arange(documents) + shard % 8 * documents,
            "start": starts,
            "position": starts + shard * tokens,
            "tokens": np.diff(np.append(starts, tokens)),
        },
        schema=INDEX_SCHEMA,
    )


def _file(path: Path) -> File:
    found = objects.stat(str(path))
    return File(path.name, found.bytes, found.modified, "0" * 64)


def _records(store: str, files: list[File], count: int, documents: int, tokens: int) -> None:
    """What the chain would have left: a record for each output, and the run's own files."""
    steps = (count - 1) * tokens // 524_288
    config = recipes.recipe("gpt2-124m", [f"steps={steps}"])
    corpus = [File(f"{n:03d}_00000.parquet", 2 * 10**9, "0", f"{n:064x}") for n in range(-(-count // 8))]
    source = _record(store, "documents", DOCUMENTS, [], corpus, rows=count * documents)
    shard = _record(store, "token_shards", TOKENS, [source], files, tokens=count * tokens)
    model = _record(store, "trained_model", f"runs/{RUN}", [shard], [], rows=steps)
    export = _record(store, "hf_model", f"runs/{RUN}/export", [model], [])
    scores = {"scores": {"completion_acc_norm": {"value": 0.294, "stderr": 0.0045, "n": 10042}}}
    items = _record(store, "eval_items", "eval_items/hellaswag-hub", [], [], rows=10_042)
    _record(store, "hellaswag", f"runs/{RUN}/scores/hellaswag", [export, items], [], metrics=scores)
    run = Path(store, "runs", RUN)
    objects.publish_json(str(run / "config.json"), to_dict(config))
    objects.publish_json(str(run / "inputs.json"), {"documents": DOCUMENTS, "tokens": TOKENS})
    (run / "metrics.jsonl").write_text("".join(_line(config, step) for step in range(steps)))


def _record(store: str, asset: str, key: str, parents: list[Parent], files: list[File], **facts: object) -> Parent:
    mark = records.fingerprint(asset, "1", {}, parents)
    when = "2026-01-01T00:00:00+00:00"
    made = Record(asset, key, mark, "1", {}, parents, files, when, when, cost={"seconds": 1.0}, **facts)  # type: ignore[arg-type]
    records.write_record(store, made)
    return Parent(key, mark)


def _line(config: RunConfig, step: int) -> str:
    position = step * config.train.batch_tokens // config.model.context
    numbers = {"loss": 3.3, "lr": 6e-4, "norm": 0.4, "tokens_per_second": 2e6, "mfu": 0.4, "seconds": 0.27}
    return json.dumps({"step": step, **numbers, "position": position, "skipped": 0, "cost": 0.0}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--shards", type=int, default=101, help="one of them for validation")
    parser.add_argument("--documents", type=int, default=100_000, help="in each shard")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in each shard")
    options = parser.parse_args()
    store = str(Path(options.folder, "store").absolute())
    if not objects.exists(records.record_url(store, TOKENS)):
        build(store, options.shards, options.documents, options.tokens)
    middle = index_name(shards.shard_name(CORPUS, "train", options.shards // 2))
    row = pq.ParquetFile(Path(store, TOKENS, middle)).read_row_group(0).slice(options.documents // 3, 1).to_pylist()[0]
    for words in (
        ["rebuild"],
        ["show", f"{RUN}/scores/hellaswag"],
        ["trace", RUN, "--step", "12345"],
        ["trace", RUN, "--document", row["id"]],
        ["trace", RUN, "--document", row["id"]],
        ["trace", RUN, "--document", row["url"]],
        ["impact", DOCUMENTS],
        ["impact", row["url"]],
        ["cost", RUN],
        ["sql", f"SELECT count(*) FROM metrics WHERE dataset = 'runs/{RUN}'"],
        ["sql", "SELECT count(*) FROM documents"],
    ):
        _time(words, store)


def _time(words: list[str], store: str) -> None:
    """Seconds on the clock, and of processor time, which a busy machine changes less."""
    command = [sys.executable, "-m", "pipeline.commands.main", "lineage", *words, "--store", store]
    began, before = time.perf_counter(), _cpu()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, processor = time.perf_counter() - began, _cpu() - before
    shown = " ".join(words)[:90]
    print(f"{seconds:6.2f} s ({processor:.2f} s of processor)  gpt2 lineage {shown}", flush=True)
    if done.returncode:
        sys.exit(done.stderr)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
