"""Which documents did a run see, at which steps, and what was made from a document itself?"""

import sys
from dataclasses import asdict
from typing import Any

from pipeline import runs
from storage import documents, objects, parquet, records, shards
from storage.documents import Place
from storage.lineage import Lineage, Node
from storage.places import Places
from training import trace
from training.config import RunConfig


def in_step(place: Places, run: str, step: int) -> list[dict[str, Any]]:
    """The documents in the batch of a step, counted from 0. Raises ValueError for a run or a step that is not there."""
    config = runs.existing(place, run)
    tokens = objects.join(place.store, runs.tokens_of(place, run))
    return [asdict(s) for s in trace.documents_of_step(tokens, config, step, _positions(place, run, config))]


def steps(place: Places, run: str, document: str) -> list[dict[str, Any]]:
    """A row for each step of the run that saw the document. Raises ValueError where its corpus has no such one."""
    runs.existing(place, run)
    key = runs.tokens_of(place, run)
    found = _find(place, key, document)
    if not found:
        raise ValueError(f"no shard in {key} has a document of the id or URL {document!r}")
    one, found_at = found[0], _steps_of(place, run, found)
    if not found_at:
        held_out = all(shards.is_of(p.shard, "val") for p in found)
        why = "it is held out, for validation" if held_out else "its shards come after the last step"
        sys.stderr.write(f"{document} of {one.shard} was seen at no step: {why}\n")
    known = {"id": one.id, "url": one.url, "shard": one.shard, "file": one.file, "row": one.row}
    return [{"step": step, **known} for step in found_at]


def readers(place: Places, index: Lineage, document: str) -> list[Node]:
    """What was made from a document itself: models whose training saw it, and what reads the shard held out.

    Shards whose documents nobody knows are passed over, and that is said.
    """
    _, rows = index.sql("SELECT namespace, name FROM artifacts WHERE job = 'token_shards'")
    read_by = []
    for key in (name for namespace, name in rows if namespace == place.store):
        if not _are_known(place, key):
            sys.stderr.write(f"passed over {key}: its shards have no index of their documents\n")
            continue
        found = _find(place, key, document)
        held_out = any(shards.is_of(p.shard, "val") for p in found)
        for node in index.made_from(key) if found else []:
            if _steps_of(place, objects.name_of(node.key), found) if node.job == "trained_model" else held_out:
                read_by.append(node)
    return read_by


def _steps_of(place: Places, run: str, found: list[Place]) -> list[int]:
    """The steps of a run that saw the document which lies in these places."""
    config = runs.existing(place, run)
    tokens = objects.join(place.store, runs.tokens_of(place, run))
    where = [(p.shard, p.start, p.tokens) for p in found]
    return trace.steps_of_places(tokens, config, where, _positions(place, run, config))


def add_texts(place: Places, found: list[dict[str, Any]]) -> None:
    """The text of each document, from the file that it was read from, which the store's paths are relative to."""
    rows: dict[str, list[int]] = {}
    for row in found:
        rows.setdefault(row["file"], []).append(row["row"])
    texts = {file: parquet.texts_at(records.file_url(place.store, "", file), rows[file]) for file in rows}
    for row in found:
        row["text"] = texts[row["file"]][row["row"]]


def _positions(place: Places, run: str, config: RunConfig) -> trace.Positions:
    """Where each step began; only a run that may have been rewound need be asked."""
    folder = objects.join(place.store, "runs", run)
    may_be_rewound = config.train.on_divergence == "rewind" and objects.exists(objects.join(folder, "metrics.jsonl"))
    return trace.positions_of(folder) if may_be_rewound else {}


def _are_known(place: Places, key: str) -> bool:
    record = records.read_record(place.store, key)
    return record is not None and documents.has_indexes(record)


def _find(place: Places, key: str, document: str) -> list[Place]:
    record = records.read_record(place.store, key)
    return documents.find(place.store, record, place.home, document) if record else []
