"""Which shards does a benchmark train on and validate on? Given or made from parquet, and named by their content."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage import parquet
from storage.batch_tokenizer import batch_tokenizer
from storage.shards import Split, open_shard, shard_name, shard_paths, write_shard

BATCH_BYTES = 4 * 2**20  # of text encoded at once


@dataclass(frozen=True)
class Corpora:
    """A folder that the trainer takes, and what tells its content from any other."""

    folder: str
    train: str  # sha256 over the shards' bytes, in order
    val: str
    train_tokens: int
    val_tokens: int

    def named(self) -> dict[str, Any]:
        """For a table of results: wherever the shards lie, equal names mean equal tokens."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def prepare(corpus: str, val: str, held_out: int, runs: Path) -> Corpora:
    """Bring a training and a validation corpus together in a folder below `runs`, made once.

    Each is a shard, a folder of shards (of which one takes the training, the other the validation shards), a parquet
    file or a folder of them, read in the order of their names, EOT before each document. Without `val` the validation
    shards are the corpus's own; but where `held_out` > 0, the last so many training tokens, which are cut off.
    Raises ValueError where a corpus is missing or too small.
    """
    if not val and not held_out and not (os.path.isdir(corpus) and shard_paths(corpus, "val")):
        raise ValueError(f"{corpus} has no validation shards (*_val_*.bin) of its own: give --val or --split")
    runs.mkdir(parents=True, exist_ok=True)
    train = shards_of(corpus, "train", runs)
    if held_out and held_out >= (tokens := sum(len(open_shard(path)) for path in train)):
        raise ValueError(f"--split {held_out} leaves nothing of {corpus}, which holds {tokens} training tokens")
    validation = [] if held_out else shards_of(val or corpus, "val", runs)
    rest = f"less-{held_out}" if held_out else fingerprint(validation)[:12]
    folder = runs / f"tokens-{fingerprint(train)[:12]}-{rest}"
    if not folder.exists() or not all(path.exists() for path in folder.iterdir()):  # what it links to has moved
        partial = Path(f"{folder}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _fill(partial, train, validation, held_out)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    there = {split: shard_paths(str(folder), split) for split in ("train", "val")}
    counts = [sum(len(open_shard(path)) for path in paths) for paths in there.values()]
    return Corpora(str(folder), fingerprint(there["train"]), fingerprint(there["val"]), *counts)


def _fill(folder: Path, train: Sequence[str], validation: Sequence[str], held_out: int) -> None:
    links, cut = [*train], []
    while (missing := held_out - sum(map(len, cut))) > 0:
        last = open_shard(links.pop())
        cut.insert(0, last[-missing:])
        if len(last) > missing:
            write_shard(str(folder / shard_name("corpus", "train", len(links) + 1)), last[:-missing])
    if cut:
        write_shard(str(folder / shard_name("corpus", "val", 0)), np.concatenate(cut))
    for index, path in enumerate(links, start=1):
        os.symlink(os.path.abspath(path), folder / shard_name("corpus", "train", index))
    for index, path in enumerate(validation):
        os.symlink(os.path.abspath(path), folder / shard_name("corpus", "val", index))


def shards_of(place: str, split: Split, scratch: Path) -> list[str]:
    """The shards at `place`; those of a parquet corpus are made in `scratch`, one for all of its documents."""
    if not os.path.exists(place):
        raise ValueError(f"{place} does not exist: give a shard, a parquet file, or a folder of either")
    if place.endswith(".bin"):
        return [place]
    if found := (shard_paths(place, split) if os.path.isdir(place) else []):
        return found
    files = [place] if place.endswith(".parquet") else sorted(map(str, Path(place).glob("*.parquet")))
    if not files:
        raise ValueError(f"{place} holds neither {split} shards (*_{split}_*.bin) nor parquet files")
    shard = scratch / f"encoded-{fingerprint(files)[:12]}.bin"
    if not shard.exists():
        write_shard(str(shard), encode(files))
    return [str(shard)]


def encode(files: Sequence[str], enough: float = math.inf) -> np.ndarray:
    """Documents of parquet files as one stream of tokens: all, or until they are enough."""
    encoder, parts, count = batch_tokenizer(), [], 0
    for texts, _ in parquet.text_batches(parquet.documents(files), BATCH_BYTES):
        parts.append(encoder.encode(texts)[0])
        if (count := count + len(parts[-1])) >= enough:
            break
    if not parts:
        raise ValueError(f"there are no documents in {', '.join(files)}")
    return np.concatenate(parts)


def fingerprint(files: Iterable[str]) -> str:
    """sha256 over the bytes of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
