"""How do documents become token shards, in parallel, resumable and exactly once?

The corpus is cut into pieces, runs of row groups of one file. Workers encode pieces in any order; the shards are
cut from the pieces by the prefix sums of their lengths, each as soon as the pieces before its end are there. A
piece or a shard appears under its name only when it is whole, and its content is a function of the corpus alone,
so a killed run goes on from what is complete and ends with the same bytes. Number of workers or machines, batch
sizes and piece sizes do not change the output: EOT before each document, shard 0 for validation, the rest for
training, the last one partial. Beside each shard lies an index of its documents.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from storage import objects
from storage.records import File, is_unchanged
from storage.shards import COMPLETE, PLAN
from training.claims import Claims
from training.cuts import Cut, cut_shard, document_at, record_name
from training.pieces import KINDS, Encoded, Piece, encode_piece, plan_pieces, read_encoded
from training.processes import locked
from training.workers import Engine, Processes, engine, process_pool

__all__ = ["Tokenized", "automatic_shard_tokens", "document_at", "tokenize", "tokenize_ahead"]

log = logging.getLogger(__name__)

FULL_SHARD = 100_000_000  # tokens, as in llm.c
SHARDS_OF_SMALL = 20  # a small corpus gives one validation shard and about this many for training
ENOUGH_TEXT = 4 * SHARDS_OF_SMALL * FULL_SHARD  # bytes: a corpus that has so many is cut into full shards
SMALLEST_SHARD = 2048  # tokens: the longest context, so that a validation shard holds a sequence
PIECES = "pieces"  # where machines share their pieces and claims, below the shards, until these are complete
POLL = 1.0  # seconds between two looks at what others have done

Progress = Callable[[int, int, int], None]


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
    engine_name: str = "processes",
    shared: bool = False,
    root: str = "",
) -> Tokenized:
    """Write the shards of `files` (parquet, in corpus order) to `out`; `work` is local scratch space.

    `progress` gets (tokens, bytes of text done, bytes of text in all) as pieces complete.
    `shared`: other machines may be at the same shards in the same store; the work is divided by claims.
    `root`: the store; the indexes name files below it by their path from there.
    Raises ValueError where the corpus is too small for a validation and a training shard.
    """
    shared = shared or (engine_name == "ray" and "RAY_ADDRESS" in os.environ)
    with ExitStack() as stack:
        place = objects.join(out, PIECES) if shared else work
        claims = stack.enter_context(Claims(objects.join(place, "claims"))) if shared else None
        lock = None if shared else stack.enter_context(_locked(work))
        job = _Job(out, corpus, shard_tokens, place, progress, claims)
        job.extend(plan_pieces(files, root))
        if not job.complete:
            job.run(stack.enter_context(engine(engine_name, workers, lock)))
        return job.result()


def tokenize_ahead(
    whole: Callable[[], list[str]],
    out: str,
    corpus: str,
    shard_tokens: int,
    work: str,
    workers: int,
    progress: Progress,
    ended: threading.Event,
    root: str = "",
) -> None:
    """Do what `tokenize` does for files of a corpus that is still being fetched, until `ended`; it goes on from there.

    `whole` gives the files that are here, in corpus order up to the first that is not. Only full shards are cut.
    """
    with _locked(work) as lock, process_pool(workers, lock) as pool:
        processes = Processes(pool, workers)
        job = _Job(out, corpus, shard_tokens, work, progress, growing=True)
        known = 0
        while not ended.is_set():
            files = whole()
            if len(files) > known:
                new = plan_pieces(files[known:], root, first=len(job.pieces))
                known = len(files)
                job.extend(new)
            if not job.step(processes):
                ended.wait(POLL)


@contextmanager
def _locked(work: str) -> Iterator[IO[str]]:
    """One run at a time works in a scratch folder; the lock goes with its processes, however they end."""
    Path(work).mkdir(parents=True, exist_ok=True)
    said = f"waiting for another process that tokenizes in {work}"
    with locked(Path(work, "lock"), lambda: log.warning(said)) as lock:
        _remove_partial(work)
        yield lock


def _remove_partial(work: str) -> None:
    """What killed workers have left; nobody else is here."""
    for left in Path(work).glob("partial-*"):
        shutil.rmtree(left)


def _start(out: str, place: str, plan: dict[str, Any], shared: bool, pieces: set[str]) -> None:
    """Remove what another corpus or shard size has left; keep what this one has begun, by the names of its pieces."""
    url = objects.join(out, PLAN)
    if shared and not objects.exists(url):
        objects.publish_json(url, plan)  # another machine may do the same now, with the same content
    there = objects.read_json(url) if objects.exists(url) else {}
    if there == plan:
        return
    if there.get("growing") and _goes_on(there, plan):
        objects.publish_json(url, plan)
        return
    if shared:
        raise ValueError(f"{out} holds shards of another corpus or size: remove it, or tokenize without sharing")
    objects.remove_tree(out)
    _clear(place, keep=pieces)
    objects.publish_json(url, plan)


def _goes_on(there: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether a plan is that of the same corpus with more of its files."""
    known = there["pieces"]
    sizes = all(there[name] == plan[name] for name in ("corpus", "shard_tokens"))
    return sizes and plan["pieces"][: len(known)] == known


def _clear(place: str, kinds: tuple[str, ...] = ("",), keep: Collection[str] = ()) -> None:
    """Remove files of such endings from a place of pieces, but not what keeps order among its users."""
    for found in objects.list_files(place):
        ordering = found.path == "lock" or found.path.startswith("claims/")
        if found.path.endswith(kinds) and not ordering and found.path not in keep:
            objects.remove(objects.join(place, found.path))


class _Job:
    """The state of one run: which pieces and shards are there, and what can be done next."""

    def __init__(
        self,
        out: str,
        corpus: str,
        shard_tokens: int,
        place: str,
        progress: Progress,
        claims: Claims | None = None,
        growing: bool = False,
    ):
        self.out, self.corpus, self.shard_tokens, self.place = out, corpus, shard_tokens, place
        self.progress, self.claims, self.growing = progress, claims, growing  # growing: more pieces may come
        self.pieces: list[Piece] = []
        self.encoded: dict[int, Encoded] = {}  # by the piece's place in the corpus
        self.cut: dict[int, list[File]] = {}  # finished shards
        self.begun: set[str] = set()  # names of the work that this process has begun
        self.elsewhere: set[str] = set()  # names of the work that others were at when we last looked
        self.complete = False  # said by the output itself
        self.removed: set[int] = set()  # pieces whose tokens are used and removed
        self.lacks_shards = False  # of an output that says that it is complete
        self.looked = -POLL

    def extend(self, new: list[Piece]) -> None:
        """Take in pieces that follow those known so far, and what is there of them already."""
        self.pieces += new
        plan = {"corpus": self.corpus, "shard_tokens": self.shard_tokens, "pieces": [p.key for p in self.pieces]}
        plan |= {"growing": True} if self.growing else {}
        _start(self.out, self.place, plan, self.claims is not None, {p.name(k) for p in self.pieces for k in KINDS})
        self.looked = -POLL
        self._look()
        if not self.complete:
            self._forget_lost_pieces()
        self._report()

    def run(self, engine: Engine) -> None:
        """Work until all shards are there."""
        while not self.finished():
            if not self.step(engine):
                time.sleep(POLL)
            if self.claims:
                self._look()
        while not self.complete:
            if not self.claims or self.claims.take("complete"):
                self._complete()
            else:  # another machine is at the last word, or has died at it
                time.sleep(POLL)
                self._look()

    def step(self, engine: Engine) -> bool:
        """Keep every worker busy, and take in one result -> whether any was to come.

        Shards that can be cut go first, since training may wait for them.
        """
        for cut in self._possible_cuts():
            if self._begin(f"shard-{cut.index:06d}"):
                engine.submit(cut_shard, self.place, self.out, self.corpus, cut)
        for piece in self.pieces:
            if not engine.free():
                break
            if piece.index not in self.encoded and self._begin(f"piece-{piece.index:06d}"):
                engine.submit(encode_piece, self.place, piece)
        if busy := engine.busy():
            self._take_result(engine)
        return busy

    def _take_result(self, engine: Engine) -> None:
        try:
            self._accept(engine.next_result())
        except FileNotFoundError:
            # so slow that others took our work over, completed all and removed the pieces: theirs is as good
            if not (self.claims and objects.exists(objects.join(self.out, COMPLETE))):
                raise

    def finished(self) -> bool:
        starts = self._starts()
        return len(starts) == len(self.pieces) + 1 and len(self.cut) == -(-starts[-1] // self.shard_tokens)

    def _begin(self, name: str) -> bool:
        """Whether this process is to do a piece of work now."""
        if name in self.begun or name in self.elsewhere:
            return False
        if self.claims and not self.claims.take(name):
            self.elsewhere.add(name)
            return False
        self.begun.add(name)
        return True

    def _end(self, name: str) -> None:
        if self.claims and name in self.claims.held:
            self.claims.release(name)

    def _accept(self, result: tuple[Piece, Encoded] | tuple[Cut, list[File]]) -> None:
        made, outcome = result
        if isinstance(made, Piece) and isinstance(outcome, Encoded):
            self.encoded[made.index] = outcome
            self._end(f"piece-{made.index:06d}")
            self._report()
        elif isinstance(made, Cut) and isinstance(outcome, list):
            self.cut[made.index] = outcome
            self._end(f"shard-{made.index:06d}")
            if not self.claims:  # another machine may still be reading them
                self._remove_used_pieces()

    def _look(self) -> None:
        """Take in what is complete: made before, or by other machines since the last look."""
        if time.monotonic() - self.looked < POLL:
            return
        self.looked = time.monotonic()
        there = {s.path: s for s in objects.list_files(self.out)}
        if COMPLETE in there:
            complete = objects.read_json(objects.join(self.out, COMPLETE))
            there = {s.path: s for s in objects.list_files(self.out)}  # again: that one may be from before its end
            self.encoded = {i: Encoded(*counts) for i, counts in enumerate(complete["pieces"])}
            shards = enumerate(complete["shards"])
            self._keep_whole({i: [File(**f) for f in files] for i, files in shards}, there)
            self.complete = self.finished()
            self.lacks_shards = not self.complete
            return
        if self.claims:  # before what is done: work ends first and its claim then
            self.elsewhere = self.claims.held_by_others()
        names = {s.path for s in objects.list_files(self.place, ".json")}
        new = [p for p in self.pieces if p.index not in self.encoded and p.name("json") in names]
        with ThreadPoolExecutor(16) as pool:
            for piece, encoded in zip(new, pool.map(lambda p: read_encoded(self.place, p), new), strict=True):
                if encoded:
                    self.encoded[piece.index] = encoded
        count = self._starts()[-1] // self.shard_tokens + 1
        new_cuts = [i for i in range(count) if i not in self.cut and record_name(i) in names]
        self._keep_whole({i: self._read_cut(i) for i in new_cuts}, there)

    def _read_cut(self, index: int) -> list[File]:
        return [File(**f) for f in objects.read_json(objects.join(self.place, record_name(index)))]

    def _keep_whole(self, shards: dict[int, list[File]], there: dict[str, objects.Stat]) -> None:
        """Count as finished the shards whose files all lie there as they were left; what was changed is removed."""
        for index, files in shards.items():
            found = [f for f in files if f.path in there]
            changed = [f for f in found if not is_unchanged(objects.join(self.out, f.path), f, there[f.path])]
            for f in changed:
                log.warning("%s is not as it was left: making it anew", objects.join(self.out, f.path))
                objects.remove(objects.join(self.out, f.path))
            if found == files and not changed:
                self.cut[index] = files

    def _forget_lost_pieces(self) -> None:
        """Pieces of finished shards are removed: where a shard was removed since, encode its pieces again."""
        if self.lacks_shards and objects.exists(complete := objects.join(self.out, COMPLETE)):
            objects.remove(complete)
        needed = {p.index: p for cut in self._possible_cuts() for p in cut.pieces}
        for piece in needed.values():
            if not objects.exists(piece.path(self.place, "bin")):
                del self.encoded[piece.index]
                if objects.exists(counts := piece.path(self.place, "json")):
                    objects.remove(counts)

    def _report(self) -> None:
        done = [p for p in self.pieces if p.index in self.encoded]
        tokens = sum(self.encoded[p.index].tokens for p in done)
        self.progress(tokens, sum(p.text_bytes for p in done), sum(p.text_bytes for p in self.pieces))

    def _starts(self) -> list[int]:
        """First token of each piece in the stream, as far as all pieces before are known, and the end."""
        starts = [0]
        for piece in self.pieces:
            if piece.index not in self.encoded:
                break
            starts.append(starts[-1] + self.encoded[piece.index].tokens)
        return starts

    def _possible_cuts(self) -> list[Cut]:
        """Shards that can be cut and are not there yet."""
        starts = self._starts()
        known, complete = starts[-1], len(starts) == len(self.pieces) + 1 and not self.growing
        if complete:
            check_size(known, self.shard_tokens)
        count = -(-known // self.shard_tokens) if complete else known // self.shard_tokens
        return [self._cut(index, starts) for index in range(count) if index not in self.cut]

    def _cut(self, index: int, starts: list[int]) -> Cut:
        first, last = index * self.shard_tokens, min((index + 1) * self.shard_tokens, starts[-1])
        over = [i for i in range(len(starts) - 1) if starts[i] < last and starts[i + 1] > first]
        return Cut(index, first, last, tuple(self.pieces[i] for i in over), tuple(starts[i] for i in over))

    def _remove_used_pieces(self) -> None:
        """Tokens of pieces that lie in finished shards alone; their counts stay until all is complete."""
        starts = self._starts()
        for i in range(len(starts) - 1):
            over = range(starts[i] // self.shard_tokens, -(-starts[i + 1] // self.shard_tokens))
            if i not in self.removed and all(index in self.cut for index in over):
                for kind in KINDS[:2]:
                    Path(self.pieces[i].path(self.place, kind)).unlink(missing_ok=True)
                self.removed.add(i)

    def _complete(self) -> None:
        counts = [[self.encoded[p.index].tokens, self.encoded[p.index].documents] for p in self.pieces]
        shards = [[asdict(f) for f in self.cut[index]] for index in sorted(self.cut)]
        objects.publish_json(objects.join(self.out, COMPLETE), {"pieces": counts, "shards": shards})
        self.complete = True
        # other machines may still be reading the counts, but no tokens
        _clear(self.place, (".bin", ".parquet") if self.claims else ("",))

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
