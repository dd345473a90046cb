"""What is in a corpus: does it hold the eval items, how much of it is there twice, how long are its documents?

Each question reads the text once, batch by batch: whether the items are in it, whether the validation documents are,
and what is there twice. Beside a batch only the last keeps anything, 8 bytes a document, and 512 more for each of the
first million. Overlap is what contamination reports in
papers count: a run of 13 words of an item (its context and right ending) that stands in a training document.
A corpus is its parquet files, or shards of tokens where somebody else has made these and there is no text.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage import objects, parquet, shards, tokenizer
from storage.shingles import Hashes, Words, shingles, words_in_parts, words_of
from storage.verification import source_url

OVERLAP_WORDS = 13  # as in GPT-3's appendix C
BATCH_TEXT = 2 * 2**20  # bytes of text looked at together
INDEX_ROWS = 2**17  # of an index of documents looked at together
EXAMPLES = 20
FILTER_BITS = 24  # of a hash: a table of 16 MiB tells most shingles of no item apart before any search
NEAR_WORDS = 5  # a shingle of the near-duplicate check
NEAR_SHARE = 0.8  # of shingles in common (estimated Jaccard similarity) makes a near duplicate
PERMUTATIONS, BANDS = 128, 16
MOST_SIGNED = 1_000_000  # documents compared with each other: 512 MB of signatures
MOST_VALIDATION = 2_000  # documents of the validation shard that are looked for in the rest


@dataclass(frozen=True)
class Overlap:
    """An item and the training document that shares a run of words with it."""

    item: str
    document: str  # its id, or "file row N" where it has none
    words: str


Rows = Mapping[str, range]  # documents by file and row; in shards, by file and token
NONE: Rows = MappingProxyType({})


@dataclass(frozen=True)
class Contamination:
    items: int
    too_short: int  # items of fewer than 13 words, which can't be judged
    contaminated: list[str]  # items found in the corpus
    documents: int  # read
    documents_with_items: int
    examples: list[Overlap] = field(default_factory=list)


class _Sought:
    """The shingles of the items, laid out for quick rejection of those of other texts."""

    def __init__(self, items: Sequence[tuple[str, str]], length: int):
        self.names = [name for name, _ in items]
        self.length = length
        self.words = words_of([text.encode("utf-8", "replace") for _, text in items])
        hashes, first = shingles(self.words, length)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.first = hashes[order], first[order]
        self.filter = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.filter[_low_bits(hashes)] = True
        self.judged = set(self.words.documents[first].tolist())

    def found_in(self, words: Words) -> list[tuple[int, int, str]]:
        """(number of the item, number of the document, the words) of each overlap."""
        hashes, first = shingles(words, self.length)
        likely = np.flatnonzero(self.filter[_low_bits(hashes)])
        left = np.searchsorted(self.hashes, hashes[likely], side="left")
        right = np.searchsorted(self.hashes, hashes[likely], side="right")
        found = []
        for at, low, high in zip(likely[left < right], left[left < right], right[left < right], strict=True):
            run = words.run(first[at], self.length)
            for place in self.first[low:high]:
                if self.words.run(place, self.length) == run:
                    found.append((int(self.words.documents[place]), int(words.documents[first[at]]), run))
        return found


def _low_bits(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << FILTER_BITS) - 1)).astype(np.int64)


def contamination(
    files: Sequence[str],
    items: Iterable[tuple[str, str]],
    leave_out: Rows = NONE,
    length: int = OVERLAP_WORDS,
) -> Contamination:
    """Which items, (name, text), share a run of `length` words with a document of `files` that is not left out.

    `leave_out` names files by their absolute paths. Documents are told apart by file and row: ids may repeat.
    """
    sought = _Sought(list(items), length)
    contaminated: dict[int, None] = {}
    examples: list[Overlap] = []
    documents, hit = 0, 0
    for batch in _batches(files):
        left_out = leave_out.get(batch.url, range(0))
        parts = words_in_parts(batch.texts, BATCH_TEXT, length)
        found = [f for words in parts for f in sought.found_in(words) if batch.rows[f[1]] not in left_out]
        documents += sum(row not in left_out for row in batch.rows)
        hit += len({document for _, document, _ in found})
        for item, document, run in found:
            if item not in contaminated and len(examples) < EXAMPLES:
                examples.append(Overlap(sought.names[item], batch.name(document), run))
            contaminated[item] = None
    bad = [sought.names[item] for item in sorted(contaminated)]
    short = len(sought.names) - len(sought.judged)
    return Contamination(len(sought.names), short, bad, documents, hit, examples)


def merged(parts: Sequence[Contamination]) -> Contamination:
    """What was found for the same items in several parts of a corpus, as if they had been read in one go."""
    found = dict.fromkeys(name for part in parts for name in part.contaminated)
    first = {e.item: e for part in reversed(parts) for e in reversed(part.examples)}
    return Contamination(
        parts[0].items,
        parts[0].too_short,
        list(found),
        sum(p.documents for p in parts),
        sum(p.documents_with_items for p in parts),
        [first[name] for name in found if name in first][:EXAMPLES],
    )


@dataclass(frozen=True)
class _Batch:
    """Neighbouring documents of one file."""

    url: str
    texts: list[bytes]
    rows: Sequence[int]  # of each in the file; in a shard, its first token
    ids: Sequence[Any] = ()
    unit: str = "row"

    def name(self, document: int) -> str:
        """What a document is shown as."""
        return _shown(self.ids[document] if self.ids else None, self.url, self.rows[document], self.unit)


def _shown(name: Any, url: str, row: int, unit: str = "row") -> str:
    return f"{url} {unit} {row}" if name in (None, "") else str(name)


def _batches(files: Sequence[str]) -> Iterator[_Batch]:
    for url in map(objects.absolute, files):  # as `held_out` names them
        if url.endswith(".bin"):
            yield from _batches_of_shard(url)
            continue
        row = 0
        for texts, others in parquet.text_batches(parquet.read_groups(url, None), BATCH_TEXT):
            table = pa.Table.from_batches(others)
            ids = table["id"].to_pylist() if "id" in table.column_names else ()
            yield _Batch(url, texts, range(row, row + len(texts)), ids)
            row += len(texts)


def _batches_of_shard(url: str) -> Iterator[_Batch]:
    """The documents of a shard, decoded; one that runs over its ends is there in part."""
    tokens = shards.read_tokens(url, 0, shards.read_header(url))
    starts = np.flatnonzero(tokens == tokenizer.EOT)
    edges = [*([0] if not len(starts) or starts[0] else []), *starts.tolist(), len(tokens)]
    texts: list[bytes] = []
    rows: list[int] = []
    size = 0
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = tokens[start:stop]
        text = tokenizer.encoding().decode_bytes(inside[inside != tokenizer.EOT].tolist())
        if texts and size + len(text) > BATCH_TEXT:
            yield _Batch(url, texts, rows, unit="token")
            texts, rows, size = [], [], 0
        texts.append(text)
        rows.append(start)
        size += len(text)
    if texts:
        yield _Batch(url, texts, rows, unit="token")


@dataclass(frozen=True)
class HeldOut:
    """Documents of the validation shard."""

    rows: Rows  # where all of them lie, to be left out
    items: list[tuple[str, str]]  # (name, text) of the first so many


def held_out(tokens_folder: str, most: int = MOST_VALIDATION) -> HeldOut:
    shard = shards.shard_paths(objects.absolute(tokens_folder), "val")[0]
    count, index = shards.read_header(shard), shards.index_name(shard)
    if not objects.exists(index):
        named = [
            (batch.name(n), text.decode("utf-8", "replace"))
            for batch in _batches_of_shard(shard)
            for n, text in enumerate(batch.texts)
        ]
        return HeldOut({shard: range(count)}, named[:most])
    held: dict[str, range] = {}
    for table in parquet.read_tables(index, INDEX_ROWS, ["file", "row"]):  # in the order of files and rows
        for rows in table.group_by("file").aggregate([("row", "min"), ("row", "max")]).to_pylist():
            url = source_url(tokens_folder, rows["file"])
            held[url] = range(held[url].start if url in held else rows["row_min"], rows["row_max"] + 1)
    documents = next(parquet.read_tables(index, most)).to_pylist()
    distinct = len({d["id"] for d in documents}) == len(documents)  # only then does an id name a document
    names = [_shown(d["id"] if distinct else None, source_url(tokens_folder, d["file"]), d["row"]) for d in documents]
    tokens = shards.read_tokens(shard, 0, count)
    texts = [tokenizer.decode(tokens[d["start"] + 1 : d["start"] + d["tokens"]]) for d in documents]
    return HeldOut(held, list(zip(names, texts, strict=True)))


def validation_overlap(files: Sequence[str], tokens_folder: str, most: int = MOST_VALIDATION) -> Contamination:
    """Which documents of the validation shard share 13 words with a training document."""
    held = held_out(tokens_folder, most)
    return contamination(files, held.items, leave_out=held.rows)


def item_texts(items: Iterable[dict[str, Any]], suite: str) -> list[tuple[str, str]]:
    """Multiple-choice items as what must not stand in the corpus: the context and the right ending."""
    return [(f"{suite} {i['ind']}", f"{i['ctx']} {i['endings'][i['label']]}") for i in items]


@dataclass(frozen=True)
class Duplicates:
    documents: int
    exact: int  # documents whose text stood in an earlier one
    compared: int  # documents compared for near duplicates: the first so many of the corpus
    near: int  # of these, documents nearly the same as an earlier one, exact ones included


def duplicates(files: Sequence[str], most: int = MOST_SIGNED) -> Duplicates:
    """How many documents are there twice, exactly or nearly (MinHash over 5-word shingles, rensa's)."""
    digests, signatures, documents = [], [], 0
    for batch in _batches(files):
        digests.append(np.array([_digest(text) for text in batch.texts], dtype=np.uint64))
        if documents < most:
            signatures.append(_signatures(batch.texts[: most - documents]))
        documents += len(batch.texts)
    exact = documents - len(np.unique(np.concatenate([np.zeros(0, np.uint64), *digests])))
    signed = np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *signatures])
    return Duplicates(documents, exact, min(documents, most), _near_duplicates(signed))


def _digest(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _signatures(texts: list[bytes]) -> NDArray[np.uint32]:
    """MinHash signatures (documents, PERMUTATIONS), of those with a shingle: fewer words are like no other document."""
    from rensa import RMinHash  # here alone: the rest of this module does without

    hashes, ends = [], np.zeros(len(texts), dtype=np.int64)
    for words in words_in_parts(texts, BATCH_TEXT, NEAR_WORDS):
        found, first = shingles(words, NEAR_WORDS)
        hashes.append(found)
        ends += np.searchsorted(words.documents[first], np.arange(len(texts)), side="right")
    bounds = np.unique(np.append(0, ends)).astype(np.uint64)  # a document without a shingle ends where it begins
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), bounds, PERMUTATIONS, 42)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, PERMUTATIONS)


def _near_duplicates(signatures: NDArray[np.uint32]) -> int:
    """Rows that agree with an earlier row of a bucket of theirs in NEAR_SHARE of all places."""
    near = np.zeros(len(signatures), dtype=bool)
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        _, first, bucket = np.unique(
            keys.view([("", np.uint32)] * width).ravel(), return_index=True, return_inverse=True
        )
        earlier = first[bucket]
        candidates = np.flatnonzero((earlier < np.arange(len(signatures))) & ~near)
        same = (signatures[candidates] == signatures[earlier[candidates]]).mean(axis=1)
        near[candidates[same >= NEAR_SHARE]] = True
    return int(near.sum())


@dataclass(frozen=True)
class Lengths:
    documents: int
    tokens: int
    quantiles: dict[str, int]  # tokens a document: shortest, p10, median, p90, longest
    histogram: list[tuple[int, int]]  # (tokens, documents of at least that many and fewer than twice that)
    tokens_by_dump: list[tuple[str, int]]  # the largest first


def lengths(tokens_folder: str, dumps: int = 30) -> Lengths:
    """How long the documents of a folder of shards are, and where they come from, by its document indexes.

    Where somebody else has made the shards there are none: a document then ends with its shard.
    """
    paths = [s.path for s in objects.list_files(tokens_folder, ".bin")]
    if not paths:
        raise ValueError(f"{tokens_folder} has no token shards: make them first")
    with duckdb.connect() as connection:
        connection.register("read", pa.concat_tables([_sizes(objects.join(tokens_folder, path)) for path in paths]))
        connection.execute("CREATE TABLE d AS SELECT * FROM read WHERE start >= 0")  # each where it begins
        return _lengths(connection, dumps)


def _sizes(shard: str) -> pa.Table:
    """start, tokens and dump of the documents in a shard."""
    index = shards.index_name(shard)
    if objects.exists(index):
        return parquet.read_table(index, ["start", "tokens", "dump"])
    count = shards.read_header(shard)
    starts = np.flatnonzero(shards.read_tokens(shard, 0, count) == tokenizer.EOT)
    sizes = np.diff(starts, append=count)
    return pa.table({"start": starts, "tokens": sizes, "dump": pa.nulls(len(starts), pa.string())})


class Running(Protocol):
    """A call that somebody works on, as of concurrent.futures."""

    def result(self) -> Any: ...


class _Done:
    def __init__(self, result: Any):
        self._result = result

    def result(self) -> Any:
        return self._result


def at_once(function: Callable[..., Any], *arguments: Any) -> Running:
    return _Done(function(*arguments))


@dataclass(frozen=True)
class Inspection:
    """All of it, for one corpus and its shards."""

    contamination: Contamination  # items in the training documents
    validation: Contamination  # documents of the validation shard in the training documents
    duplicates: Duplicates
    lengths: Lengths


def inspect(
    files: Sequence[str],
    tokens_folder: str,
    items: Sequence[tuple[str, str]],
    submit: Callable[..., Running] = at_once,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Look at `files`, at the shards made from them, and for the `items` in all that is not held out.

    `submit` runs calls that do not depend on each other, such as an executor's; `progress` gets how many are done.
    """
    held = held_out(tokens_folder)
    copies, sizes = submit(duplicates, files), submit(lengths, tokens_folder)
    wanted = [submit(contamination, [file], items, held.rows) for file in files]
    overlaps = [submit(contamination, [file], held.items, held.rows) for file in files]
    results = []
    for running in (*wanted, *overlaps, copies, sizes):
        results.append(running.result())
        progress(len(results), 2 * len(files) + 2)
    count = len(files)
    return Inspection(merged(results[:count]), merged(results[count : 2 * count]), *results[2 * count :])


def by_suite(found: Contamination, items: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Items and contaminated ones of each suite, the first word of an item's name."""
    asked = Counter(name.split()[0] for name, _ in items)
    hit = Counter(name.split()[0] for name in found.contaminated)
    return {suite: {"items": count, "contaminated": hit[suite]} for suite, count in asked.items()}


def numbers(found: Inspection) -> dict[str, int | float]:
    """What was found as named numbers, for a check's metadata or a record's metrics."""
    share = found.duplicates.near / max(found.duplicates.compared, 1)
    return {
        "items": found.contamination.items,
        "contaminated_items": len(found.contamination.contaminated),
        "documents_with_items": found.contamination.documents_with_items,
        "too_short_items": found.contamination.too_short,
        "validation_documents": found.validation.items,
        "validation_documents_in_training": len(found.validation.contaminated),
        "documents": found.duplicates.documents,
        "exact_duplicates": found.duplicates.exact,
        "compared_documents": found.duplicates.compared,
        "near_duplicates_share": round(share, 4),
        "tokens": found.lengths.tokens,
        **{f"tokens_a_document_{name}": value for name, value in found.lengths.quantiles.items()},
    }


def _lengths(connection: duckdb.DuckDBPyConnection, dumps: int) -> Lengths:
    numbers = connection.execute(
        "SELECT count(*), coalesce(sum(tokens), 0)::BIGINT, coalesce(min(tokens), 0), "
        "coalesce(quantile_disc(tokens, 0.1), 0), coalesce(quantile_disc(tokens, 0.5), 0), "
        "coalesce(quantile_disc(tokens, 0.9), 0), coalesce(max(tokens), 0) FROM d"
    ).fetchone()
    assert numbers is not None
    histogram = connection.execute(
        "SELECT (2 ** floor(log2(tokens)))::BIGINT AS size, count(*) FROM d GROUP BY size ORDER BY size"
    ).fetchall()
    by_dump = connection.execute(
        "SELECT coalesce(dump, ''), sum(tokens)::BIGINT AS n FROM d GROUP BY 1 ORDER BY n DESC, 1 LIMIT ?", [dumps]
    ).fetchall()
    quantiles = dict(zip(("shortest", "p10", "median", "p90", "longest"), numbers[2:], strict=True))
    return Lengths(numbers[0], numbers[1], quantiles, histogram, by_dump)
