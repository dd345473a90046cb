"""How do documents become token shards, in parallel, resumable and exactly once?

The corpus is cut into pieces, runs of row groups of one file. Worker processes encode pieces in any order;
the shards are cut from the pieces by the prefix sums of their lengths, each as soon as the pieces before
its end are there. A piece or a shard appears under its name only when it is whole, and its content is a
function of the corpus alone, so a killed run goes on from what is complete and ends with the same bytes.
Number of workers, batch sizes and piece sizes do not change the output: EOT before each document, shard 0
for validation, the rest for training, the last one partial.

Beside each shard lies an index of its documents (`<shard>.documents.parquet`): from a position in a shard
one finds the document.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import objects, shards, sources
from storage.batch_tokenizer import Mismatch, batch_tokenizer, encode_by_reference
from storage.records import File
from training.workers import Engine

log = logging.getLogger(__name__)

EDITION = 1  # of what is written: raise it when the same corpus gives other bytes
FULL_SHARD = 100_000_000  # tokens, as in llm.c
PIECE_TEXT = 64 * 2**20  # bytes of text a piece: a few seconds of work, lost when a worker dies
SHARDS_OF_SMALL = 20  # a small corpus gives one validation shard and about this many for training
SMALLEST_SHARD = 2048  # tokens: the longest context, so that a validation shard holds a sequence
BATCH_TEXT = 4 * 2**20  # bytes of text encoded at once
PLAN = "plan.json"  # what a folder of shards is being made from
COPY_TOKENS = 2**22  # tokens copied at once when a shard is cut

INDEX_SCHEMA = pa.schema(
    [("id", pa.string()), ("url", pa.string()), ("dump", pa.string())]
    + [("file", pa.string()), ("row", pa.int64())]  # where the document came from
    + [("start", pa.int64())]  # of its EOT in this shard; below 0 where it began in an earlier one
    + [("position", pa.int64())]  # of its EOT in the whole corpus's stream
    + [("tokens", pa.int64())]  # its length with the EOT
)

Progress = Callable[[int, int, int], None]
Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Piece:
    """A run of row groups of one file; `key` changes when its content would."""

    index: int
    url: str
    groups: tuple[int, ...]
    first_row: int
    text_bytes: int
    key: str


@dataclass(frozen=True)
class Encoded:
    """What is known of a complete piece."""

    tokens: int
    documents: int


@dataclass(frozen=True)
class Cut:
    """One shard to be cut: its place in the corpus's stream and the pieces that it runs over."""

    index: int
    start: int  # first token, in the corpus's stream
    stop: int
    pieces: tuple[Piece, ...]
    piece_starts: tuple[int, ...]


@dataclass(frozen=True)
class Tokenized:
    tokens: int
    documents: int
    shards: int
    files: list[File]  # shards and their indexes, paths relative to the output's folder


def automatic_shard_tokens(text_bytes: int) -> int:
    """100M tokens, or for a small corpus about a twentieth of it: a validation shard and training shards."""
    estimated = text_bytes // 4  # English prose has 4.2 to 4.6 bytes a token
    return int(np.clip(estimated // SHARDS_OF_SMALL, SMALLEST_SHARD, FULL_SHARD))


def tokenize(
    files: Sequence[str],
    out: str,
    corpus: str,
    shard_tokens: int,
    work: str,
    workers: int,
    progress: Progress,
) -> Tokenized:
    """Write the shards of `files` (parquet, in corpus order) to `out`; `work` is local scratch space.

    `progress` gets (tokens, bytes of text done, bytes of text in all) as pieces complete.
    Raises ValueError where the corpus is too small for a validation and a training shard.
    """
    Path(work).mkdir(parents=True, exist_ok=True)
    with _lock(work), Engine(workers) as engine:
        pieces = plan_pieces(files)
        _start_anew_if_changed(out, work, corpus, shard_tokens, pieces)
        job = _Job(out, corpus, shard_tokens, work, pieces, progress)
        job.run(engine)
        return job.result()


@contextmanager
def _lock(work: str) -> Iterator[None]:
    """One process at a time works in a scratch folder; the lock goes with the process, however it ends."""
    with open(os.path.join(work, "lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that tokenizes in %s", work)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def plan_pieces(files: Sequence[str]) -> list[Piece]:
    """The pieces of a corpus in its order, from the files' metadata alone."""
    pieces: list[Piece] = []
    for url in files:
        metadata = sources.read_metadata(url)
        content = f"{EDITION} {url} {objects.stat(url)}"
        row = 0
        for groups, text_bytes in _group_runs(sources.group_text_bytes(metadata)):
            key = hashlib.sha256(f"{content} {groups}".encode()).hexdigest()[:16]
            pieces.append(Piece(len(pieces), url, groups, row, text_bytes, key))
            row += sum(metadata.row_group(g).num_rows for g in groups)
    return pieces


def _group_runs(text_bytes: list[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Neighbouring row groups of about PIECE_TEXT together: (their numbers, bytes of text)."""
    run: list[int] = []
    for group, size in enumerate(text_bytes):
        if run and sum(text_bytes[g] for g in run) + size > PIECE_TEXT:
            yield tuple(run), sum(text_bytes[g] for g in run)
            run = []
        run.append(group)
    if run:
        yield tuple(run), sum(text_bytes[g] for g in run)


def _start_anew_if_changed(out: str, work: str, corpus: str, shard_tokens: int, pieces: Sequence[Piece]) -> None:
    """Remove what another corpus or shard size has left in `out` and `work`; keep what this one has begun."""
    plan = {"corpus": corpus, "shard_tokens": shard_tokens, "pieces": [p.key for p in pieces]}
    if not _has_plan(out, plan):
        objects.remove_tree(out)
        objects.publish_json(objects.join(out, PLAN), plan)
    if not _has_plan(work, plan | {"out": out}):
        for folder in ("pieces", "shards"):
            shutil.rmtree(os.path.join(work, folder), ignore_errors=True)
        objects.publish_json(os.path.join(work, PLAN), plan | {"out": out})


def _has_plan(folder: str, plan: dict[str, object]) -> bool:
    url = objects.join(folder, PLAN)
    return objects.exists(url) and objects.read_json(url) == plan


class _Job:
    """The state of one run: which pieces and shards are there, and what can be done next."""

    def __init__(self, out: str, corpus: str, shard_tokens: int, work: str, pieces: list[Piece], progress: Progress):
        self.out, self.corpus, self.shard_tokens, self.work = out, corpus, shard_tokens, work
        self.pieces, self.progress = pieces, progress
        self.encoded = {p.index: e for p in pieces if (e := read_encoded(work, p))}
        self.cut: dict[int, list[File]] = {}
        self.waiting = [p for p in pieces if p.index not in self.encoded]
        self.text_bytes = sum(p.text_bytes for p in pieces)

    def run(self, engine: Engine) -> None:
        """Keep every worker busy: shards that can be cut go first, since training may wait for them."""
        self._report()
        handed_out: set[int] = set()
        while True:
            for cut in self._possible_cuts(handed_out):
                handed_out.add(cut.index)
                self._begin_cut(engine, cut)
            while self.waiting and engine.free():
                engine.submit(encode_piece, self.work, self.waiting.pop(0))
            if not engine.busy():
                break
            self._accept(engine.next_result())

    def _begin_cut(self, engine: Engine, cut: Cut) -> None:
        if files := read_cut(self.work, self.out, self.corpus, cut):
            self.cut[cut.index] = files
            return
        lost = [p for p in cut.pieces if not os.path.exists(_piece_path(self.work, p, "bin"))]
        for piece in lost:  # a finished shard's pieces are removed; this shard was removed since
            encode_piece(self.work, piece)
        engine.submit(cut_shard, self.work, self.out, self.corpus, cut)

    def _accept(self, result: tuple[Piece, Encoded] | tuple[Cut, list[File]]) -> None:
        made, outcome = result
        if isinstance(made, Piece) and isinstance(outcome, Encoded):
            self.encoded[made.index] = outcome
            self._report()
        elif isinstance(made, Cut) and isinstance(outcome, list):
            self.cut[made.index] = outcome
            self._remove_used_pieces()

    def _report(self) -> None:
        done = [p for p in self.pieces if p.index in self.encoded]
        tokens = sum(self.encoded[p.index].tokens for p in done)
        self.progress(tokens, sum(p.text_bytes for p in done), self.text_bytes)

    def _starts(self) -> list[int]:
        """First token of each piece in the stream, as far as all pieces before are known, and the end."""
        starts = [0]
        for piece in self.pieces:
            if piece.index not in self.encoded:
                break
            starts.append(starts[-1] + self.encoded[piece.index].tokens)
        return starts

    def _possible_cuts(self, handed_out: set[int]) -> list[Cut]:
        starts = self._starts()
        known, complete = starts[-1], len(starts) == len(self.pieces) + 1
        if complete:
            check_size(known, self.shard_tokens)
        count = -(-known // self.shard_tokens) if complete else known // self.shard_tokens
        return [self._cut(index, starts) for index in range(count) if index not in handed_out]

    def _cut(self, index: int, starts: list[int]) -> Cut:
        first, last = index * self.shard_tokens, min((index + 1) * self.shard_tokens, starts[-1])
        over = [i for i in range(len(starts) - 1) if starts[i] < last and starts[i + 1] > first]
        return Cut(index, first, last, tuple(self.pieces[i] for i in over), tuple(starts[i] for i in over))

    def _remove_used_pieces(self) -> None:
        """Tokens of pieces that lie in finished shards alone; their counts stay."""
        starts = self._starts()
        for i in range(len(starts) - 1):
            over = range(starts[i] // self.shard_tokens, -(-starts[i + 1] // self.shard_tokens))
            if all(index in self.cut for index in over):
                for kind in ("bin", "parquet"):
                    Path(_piece_path(self.work, self.pieces[i], kind)).unlink(missing_ok=True)

    def result(self) -> Tokenized:
        done = self.encoded.values()
        files = [f for index in sorted(self.cut) for f in self.cut[index]]
        return Tokenized(sum(e.tokens for e in done), sum(e.documents for e in done), len(self.cut), files)


def check_size(tokens: int, shard_tokens: int) -> None:
    if tokens <= shard_tokens:
        raise ValueError(
            f"the corpus has {tokens:,} tokens, which one shard of {shard_tokens:,} holds, and that is the "
            f"validation shard: set tokenize.shard_tokens below {max(tokens, 1):,}, or use more documents"
        )


def _piece_path(work: str, piece: Piece, kind: str) -> str:
    return os.path.join(work, "pieces", f"{piece.index:06d}-{piece.key}.{kind}")


def read_encoded(work: str, piece: Piece) -> Encoded | None:
    path = _piece_path(work, piece, "json")
    return Encoded(**objects.read_json(path)) if os.path.exists(path) else None


def encode_piece(work: str, piece: Piece) -> tuple[Piece, Encoded]:
    """Encode one piece into `work`: its tokens, its documents, and last the count that makes it complete."""
    try:
        return piece, _encode_piece(work, piece, batch_tokenizer().encode)
    except Mismatch as mismatch:
        log.warning("the fast tokenizer is wrong on %s (%s): tiktoken encodes this piece", piece.url, mismatch)
        return piece, _encode_piece(work, piece, encode_by_reference)


def _encode_piece(work: str, piece: Piece, encode: Encode) -> Encoded:
    partial = _piece_path(work, piece, f"{os.getpid()}.partial")
    Path(partial).parent.mkdir(parents=True, exist_ok=True)
    lengths, described = [], []
    with open(partial, "wb") as f:
        read = sources.read_groups(piece.url, piece.groups)
        for texts, descriptions in sources.text_batches(read, BATCH_TEXT):
            tokens, counts = encode(texts)
            tokens.tofile(f)
            lengths.append(counts)
            described += descriptions
    index = _piece_index(piece, np.concatenate([np.zeros(0, np.int64), *lengths]), described)
    pq.write_table(index, f"{partial}.index", compression="zstd")
    os.replace(f"{partial}.index", _piece_path(work, piece, "parquet"))
    os.replace(partial, _piece_path(work, piece, "bin"))
    encoded = Encoded(sum(int(counts.sum()) for counts in lengths), len(index))
    objects.publish_json(_piece_path(work, piece, "json"), asdict(encoded))
    return encoded


def _piece_index(piece: Piece, lengths: np.ndarray, described: list[pa.RecordBatch]) -> pa.Table:
    """The documents of a piece; `position` counts from the piece's first token."""
    rows = len(lengths)
    known = pa.Table.from_batches(described) if described else pa.table({})
    absent = pa.nulls(rows, pa.string())
    columns = {
        name: known[name].cast(pa.string()) if name in known.column_names else absent for name in ("id", "url", "dump")
    }
    columns["file"] = pa.array([piece.url] * rows, pa.string()).dictionary_encode().cast(pa.string())
    columns["row"] = pa.array(np.arange(piece.first_row, piece.first_row + rows))
    columns["start"] = columns["position"] = pa.array(np.cumsum(lengths) - lengths)
    columns["tokens"] = pa.array(lengths)
    return pa.table(columns, schema=INDEX_SCHEMA)


def _index_name(shard: str) -> str:
    return shard.removesuffix(".bin") + ".documents.parquet"


def _cut_record(work: str, cut: Cut) -> str:
    return os.path.join(work, "shards", f"{cut.index:06d}.json")


def read_cut(work: str, out: str, corpus: str, cut: Cut) -> list[File] | None:
    """The files of a shard that an earlier run has finished, if they are still there as it left them."""
    path = _cut_record(work, cut)
    if not os.path.exists(path):
        return None
    files = [File(**entry) for entry in objects.read_json(path)]
    for file in files:
        url = objects.join(out, file.path)
        if not objects.exists(url) or objects.stat(url).bytes != file.bytes:
            return None
    return files


def cut_shard(work: str, out: str, corpus: str, cut: Cut) -> tuple[Cut, list[File]]:
    """Publish one shard and, before it, the index of its documents."""
    name = shards.shard_name(corpus, shards.split_of(cut.index), cut.index)
    folder = os.path.join(work, "shards")
    Path(folder).mkdir(parents=True, exist_ok=True)
    local = os.path.join(folder, f"{cut.index:06d}.{os.getpid()}.partial")
    pq.write_table(_shard_index(work, cut), local, compression="zstd")
    files = [_publish(local, out, _index_name(name))]
    _write_tokens(work, cut, local)
    files = [_publish(local, out, name), *files]
    objects.publish_json(_cut_record(work, cut), [asdict(f) for f in files])
    return cut, files


def _publish(local: str, out: str, name: str) -> File:
    url = objects.join(out, name)
    digest = objects.sha256(local)
    objects.publish_file(local, url)
    os.unlink(local)
    stat = objects.stat(url)
    return File(name, stat.bytes, stat.modified, digest)


def _overlaps(cut: Cut) -> Iterator[tuple[Piece, int, int]]:
    """For each piece of a shard: (piece, its first token in the stream, its first token in the shard)."""
    for piece, start in zip(cut.pieces, cut.piece_starts, strict=True):
        yield piece, start, start - cut.start


def _write_tokens(work: str, cut: Cut, local: str) -> None:
    with open(local, "wb") as f:
        f.write(shards.header(shards.MAGIC, cut.stop - cut.start))
        for piece, start, _ in _overlaps(cut):
            tokens = np.memmap(_piece_path(work, piece, "bin"), dtype="<u2", mode="r")
            for block in shards.blocks(tokens[max(0, cut.start - start) : cut.stop - start], COPY_TOKENS):
                block.tofile(f)


def _shard_index(work: str, cut: Cut) -> pa.Table:
    """Every document that has a token in the shard, the one that runs in from the shard before included."""
    tables = []
    for piece, start, offset in _overlaps(cut):
        table = _read_index(_piece_path(work, piece, "parquet"))
        begins = table["position"].to_numpy()
        inside = (begins + start < cut.stop) & (begins + table["tokens"].to_numpy() + start > cut.start)
        table = table.filter(pa.array(inside))
        begins = begins[inside]
        columns = {name: table[name] for name in table.column_names}
        columns |= {"start": pa.array(begins + offset), "position": pa.array(begins + start)}
        tables.append(pa.table(columns, schema=INDEX_SCHEMA))
    return pa.concat_tables(tables)


def _read_index(url: str) -> pa.Table:
    with objects.open_file(url) as f:
        return pq.ParquetFile(f).read(use_threads=False)


def document_at(shard: str, position: int) -> dict[str, object]:
    """The document that holds a token of a shard: its id, url, dump, file, row, start and length.

    Raises ValueError where the shard has no such position.
    """
    count = shards.read_header(shard)
    if not 0 <= position < count:
        raise ValueError(f"{shard} has no token {position:,}, only 0 to {count - 1:,}")
    table = _read_index(_index_name(shard))
    row = int(np.searchsorted(table["start"].to_numpy(), position, side="right")) - 1
    return table.slice(row, 1).to_pylist()[0]
