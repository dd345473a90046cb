"""What can a demo be asked that it has not read? Items in HellaSwag's format, from held-out documents.

A context of a few sentences, the sentence that really follows, and three that follow elsewhere: drawn from
other documents of the same set, near the right one in length, so that length gives nothing away. Easier than
HellaSwag, whose wrong endings were made to fool models: a score here is compared with nothing published.
"""

import bisect
import heapq
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from storage import shards, tokenizer

CONTEXT_SENTENCES = 2
WORDS = range(6, 41)  # words in a usable ending: shorter ones say nothing, longer ones dilute the choice
PER_DOCUMENT = 8  # at most, so that one long document does not fill the set; doubled where that is too few
MOST_DOCUMENTS = 2_000  # the first ones; a full shard holds a hundred thousand
NEAR = 24  # documents whose endings are nearest in length: wrong endings are drawn from these
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Passage:
    document: str
    context: str
    ending: str


def held_out_documents(shard: str) -> Iterator[tuple[str, str]]:
    """(id, text) of the whole documents in a shard; one that its ends cut through is left out."""
    tokens = shards.open_shard(shard)
    starts = (tokens == tokenizer.EOT).nonzero()[0].tolist()
    for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        yield f"document {number} at token {start}", tokenizer.decode(tokens[start + 1 : end])


def make_items(texts: Iterable[tuple[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` items (fewer where the texts hold fewer); the same texts, count and seed give the same items.

    Raises ValueError where the documents are too few to draw wrong endings from others.
    """
    draw = random.Random(seed)
    found = [_passages(document, text) for document, text in itertools.islice(texts, MOST_DOCUMENTS)]
    most = PER_DOCUMENT
    while sum(min(most, len(several)) for several in found) < count and any(len(several) > most for several in found):
        most *= 2
    passages = [p for several in found for p in draw.sample(several, min(most, len(several)))]
    documents = {p.document for p in passages}
    if len(documents) < 4:
        raise ValueError(
            f"completion items need usable passages in at least 4 held-out documents, "
            f"found {len(documents)}: use a larger validation shard"
        )
    chosen = draw.sample(passages, min(count, len(passages)))
    by_length = sorted(passages, key=lambda p: (len(p.ending), p.ending, p.document))
    return [_item(number, passage, by_length, draw) for number, passage in enumerate(chosen)]


def _passages(document: str, text: str) -> list[Passage]:
    """Every place in a paragraph where a usable sentence follows its context."""
    found = []
    for paragraph in text.split("\n\n"):
        sentences = SENTENCE_END.split(" ".join(paragraph.split()))
        for at in range(CONTEXT_SENTENCES, len(sentences)):
            ending = sentences[at]
            if len(ending.split()) in WORDS and ending[-1] in ".!?":
                found.append(Passage(document, " ".join(sentences[at - CONTEXT_SENTENCES : at]), ending))
    return found


def _item(number: int, passage: Passage, by_length: list[Passage], draw: random.Random) -> dict[str, Any]:
    endings = [passage.ending, *_wrong_endings(passage, by_length, draw)]
    draw.shuffle(endings)
    return {
        "ind": number,
        "activity_label": "Reading",
        "ctx": passage.context,
        "ctx_a": passage.context,
        "ctx_b": "",
        "endings": endings,
        "label": endings.index(passage.ending),
        "split": "val",
        "source_id": passage.document,
    }


def _wrong_endings(passage: Passage, by_length: list[Passage], draw: random.Random) -> list[str]:
    """Three different endings of three other documents, among the nearest in length."""
    seen: set[str] = {passage.document}
    usable: set[str] = set()
    for other in _nearest(len(passage.ending), by_length):
        if other.document not in seen and other.ending != passage.ending:
            seen.add(other.document)
            usable.add(other.ending)
        if len(seen) > NEAR:
            break
    if len(usable) < 3:
        raise ValueError("held-out documents repeat each other's sentences: use a larger validation shard")
    return draw.sample(sorted(usable), 3)


def _nearest(length: int, by_length: list[Passage]) -> Iterator[Passage]:
    """Passages from the nearest in length of ending to the furthest."""
    at = bisect.bisect_left(by_length, length, key=lambda p: len(p.ending))
    shorter = (by_length[n] for n in range(at - 1, -1, -1))
    longer = (by_length[n] for n in range(at, len(by_length)))
    return heapq.merge(shorter, longer, key=lambda p: abs(len(p.ending) - length))
