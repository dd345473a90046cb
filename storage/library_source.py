"""How does any dataset that the `datasets` library can load become documents?

It is read as a stream and written as parquet, so that everything after it is as for any other corpus.
Datasets that are parquet on the hub already are quicker to have by their place,
`hf://datasets/OWNER/NAME/FOLDER`.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import hub, objects, parquet
from storage.records import File, describe_file

FILE_TEXT = 2**30  # bytes of text a parquet file
ROWS = 1000  # documents a row group, as in FineWeb-Edu


@dataclass(frozen=True)
class LibrarySource:
    """`datasets:NAME[:CONFIG[:SPLIT]]`; NAME may be a local folder."""

    place: str
    config: str
    split: str
    revision: str  # a commit of the hub's, or a digest of a local folder's files
    name: str
    kind: str = "documents"

    @classmethod
    def at(cls, corpus: str, revision: str = "") -> "LibrarySource":
        """As it is now, or at a commit of the hub's that was found before."""
        place, config, split = [*corpus.removeprefix("datasets:").split(":"), "", ""][:3]
        if not place:
            raise ValueError(f"{corpus!r} names no dataset: write datasets:NAME, datasets:NAME:CONFIG:SPLIT")
        revision = local_digest(place) if os.path.isdir(place) else revision or hub.commit_of(place)
        label = objects.safe_name(":".join(filter(None, [place, config, split])))
        return cls(place, config, split or "train", revision, f"{label[-60:].strip('-.')}-{revision[:8]}")

    @property
    def identity(self) -> dict[str, Any]:
        where = {} if os.path.isdir(self.place) else {"name": self.place}
        return {"kind": "datasets", **where, "config": self.config, "split": self.split, "revision": self.revision}

    @property
    def details(self) -> dict[str, Any]:
        return {"url": self.place}

    def fetch(self, out: str, progress: Callable[[int, int], None], scratch: str = "") -> list[File]:
        """Nobody knows the total beforehand: `progress` gets the bytes written so far, twice."""
        names: list[str] = []
        done = 0
        for table_file in self._files(scratch):
            names.append(f"{len(names):03d}_00000.parquet")
            done += os.path.getsize(table_file)
            objects.publish_file(table_file, objects.join(out, names[-1]))
            progress(done, done)
        return [describe_file(out, name) for name in names]

    def _files(self, scratch: str) -> Iterator[str]:
        """Local parquet files of about FILE_TEXT of text; each is removed when the next is asked for."""
        if scratch:
            os.makedirs(scratch, exist_ok=True)
        batches = self._batches()
        more = next(batches, None)
        while more is not None:
            with tempfile.TemporaryDirectory(dir=scratch or None) as folder:
                path = os.path.join(folder, "documents.parquet")
                size = 0
                with pq.ParquetWriter(path, more.schema, compression="zstd") as writer:
                    while more is not None and size < FILE_TEXT:
                        writer.write_table(more)
                        size += more[parquet.TEXT].nbytes
                        more = next(batches, None)
                yield path

    def _batches(self) -> Iterator[pa.Table]:
        import datasets  # here alone: it takes a second, and other corpora do not need it

        revision = None if os.path.isdir(self.place) else self.revision
        stream = datasets.load_dataset(
            self.place, self.config or None, split=self.split, revision=revision, streaming=True
        )
        for batch in stream.iter(ROWS):
            if parquet.TEXT not in batch:
                raise ValueError(f"datasets:{self.place} has no column `text`, only {', '.join(batch)}")
            strange = next((text for text in batch[parquet.TEXT] if not isinstance(text, str | bytes | None)), None)
            if strange is not None:
                raise ValueError(f"datasets:{self.place} has a text that is no string: {strange!r:.99}")
            columns = {name: batch[name] for name in parquet.COLUMNS if name in batch}
            others = {name: _strings(values) for name, values in columns.items() if name != parquet.TEXT}
            yield pa.table({name: pa.array(values, pa.string()) for name, values in (columns | others).items()})


def _strings(values: list[Any]) -> list[str | None]:
    """Ids are numbers in many a dataset."""
    return [None if value is None else str(value) for value in values]


def local_digest(folder: str) -> str:
    """sha256 over a folder's files by name, in hex."""
    listed = [f"{s.path} {objects.sha256(objects.join(folder, s.path))}" for s in objects.list_files(folder)]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
