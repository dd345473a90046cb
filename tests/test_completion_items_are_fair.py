"""Items made from held-out documents: HellaSwag's format, wrong endings from elsewhere, always the same."""

from pathlib import Path

import numpy as np
import pytest

from evals import completion_items, hellaswag
from storage import shards, tokenizer

PLACES = ("harbour", "valley", "city", "desert", "forest", "island", "river", "market")
TEXTS = [
    (
        f"doc {place}",
        f"The {place} was quiet in the early morning. People of the {place} slept until noon. "
        f"The people who lived near the {place} {'often ' * n}walked there with their dogs. "
        f"A stranger came to the {place} one day and asked for water.\n\n"
        f"Nobody in the {place} knew his name. He stayed for a year. Then he left the {place} for good.",
    )
    for n, place in enumerate(PLACES)
]


def test_the_right_ending_follows_its_context_and_the_wrong_ones_come_from_elsewhere() -> None:
    texts = dict(TEXTS)
    for item in completion_items.make_items(TEXTS, 12, seed=3):
        right = item["endings"][item["label"]]
        assert f"{item['ctx']} {right}" in texts[item["source_id"]]
        wrong = [ending for n, ending in enumerate(item["endings"]) if n != item["label"]]
        assert not any(ending in texts[item["source_id"]] for ending in wrong)
        sources = [{d for d, text in texts.items() if ending in text} for ending in wrong]
        assert len(set.union(*sources)) == 3
        hellaswag.item(item, "item")  # whole, by the reader that scores it


def test_same_input_and_seed_give_the_same_items() -> None:
    assert completion_items.make_items(TEXTS, 10, 1) == completion_items.make_items(iter(TEXTS), 10, 1)
    assert completion_items.make_items(TEXTS, 10, 1) != completion_items.make_items(TEXTS, 10, 2)


def test_labels_are_spread() -> None:
    labels = [item["label"] for item in completion_items.make_items(TEXTS, 24, 1)]
    assert len(labels) == 24 and set(labels) == {0, 1, 2, 3}


def test_a_document_gives_more_only_where_all_together_are_too_few() -> None:
    long = [(f"doc {p}", " ".join(f"The {p} has a house with number {n}." for n in range(60))) for p in PLACES]
    few = completion_items.make_items(long, 64, 1)
    assert len(few) == 64
    assert max(sum(i["source_id"] == d for i in few) for d, _ in long) == 8
    assert len(completion_items.make_items(long, 200, 1)) == 200


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 held-out documents, found 3"):
        completion_items.make_items(TEXTS[:3], 10, 1)


def test_held_out_documents_are_the_whole_ones_of_a_shard(tmp_path: Path) -> None:
    path = str(tmp_path / "x_val_000000.bin")
    texts = ["tail of a cut document", "one document", "another document", "head of a cut one"]
    parts = [tokenizer.encode(texts[0])] + [np.concatenate([[tokenizer.EOT], tokenizer.encode(t)]) for t in texts[1:]]
    shards.write_shard(path, np.concatenate(parts).astype(np.uint16))
    assert [text for _, text in completion_items.held_out_documents(path)] == texts[1:3]
