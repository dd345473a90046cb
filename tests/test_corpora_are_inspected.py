"""What stands in a corpus is found: items by the words of a slow search, copies by what was copied."""

import random
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from test_core_centres_its_tasks import write_bundle

from assets.checks import core_items
from storage import inspection, items, tokenizer
from storage.shingles import shingles, words_in_parts, words_of
from training import tokenization

VOCABULARY = [f"w{n}" for n in range(60)]  # few words, so that runs of them meet by chance


def write(folder, documents: list[str], files: int = 2) -> list[str]:
    paths = []
    for number in range(files):
        part = documents[number::files]
        ids = [f"doc {number} {n}" for n in range(len(part))]
        path = str(folder / f"{number:03d}.parquet")
        pq.write_table(pa.table({"text": part, "id": ids, "dump": ["d"] * len(part)}), path, row_group_size=7)
        paths.append(path)
    return paths


def slow_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def slow_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = slow_words(text)
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def random_text(choose: random.Random, words: int) -> str:
    joints = [" ", ", ", ". ", "\n", " - ", "\u2014", "\u2019 ", "\u00a0"]
    return "".join(word + choose.choice(joints) for word in choose.choices(VOCABULARY, k=words))


@pytest.mark.parametrize("length", [2, 3, 13])
def test_overlaps_are_those_that_a_slow_search_finds(tmp_path, length):
    choose = random.Random(5)
    documents = [random_text(choose, choose.randrange(0, 120)) for _ in range(60)]
    questions = [(f"item {n}", random_text(choose, choose.randrange(0, 20))) for n in range(80)]
    questions += [(f"copied {n}", documents[n][3:150].upper()) for n in range(0, 40, 4)]
    found = inspection.contamination(write(tmp_path, documents), questions, length=length)
    runs = set().union(*(slow_runs(d, length) for d in documents))
    expected = [name for name, text in questions if slow_runs(text, length) & runs]
    assert found.contaminated == expected and expected
    hit = [d for d in documents if slow_runs(d, length) & set().union(*(slow_runs(t, length) for _, t in questions))]
    assert (found.documents, found.documents_with_items) == (60, len(hit))
    assert found.too_short == sum(not slow_runs(text, length) for _, text in questions)
    by_name = dict(questions)
    for example in found.examples:
        assert tuple(example.words.split()) in slow_runs(by_name[example.item], length)


def test_a_run_over_two_documents_is_no_overlap(tmp_path):
    words = [f"word{n}" for n in range(20)]
    files = write(tmp_path, [" ".join(words[:10]), " ".join(words[10:])], files=1)
    assert inspection.contamination(files, [("item", " ".join(words))]).contaminated == []


def test_items_are_their_context_and_right_ending():
    item = {"ind": 3, "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 2}
    assert inspection.item_texts([item], "hellaswag") == [("hellaswag 3", "A man c")]


def test_bytes_that_are_no_text_do_not_stop_the_search(tmp_path):
    raw = [b"broken \xff\xfe bytes " + b" ".join(b"w%d" % n for n in range(15)), b""]
    column = pa.Array.from_buffers(pa.string(), 2, pa.array(raw, pa.binary()).buffers())
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": column}), path)
    found = inspection.contamination([path], [("item", " ".join(f"w{n}" for n in range(14)))])
    assert found.contaminated == ["item"] and found.examples[0].document == f"{path} row 0"


def test_hashes_of_words_do_not_depend_on_their_place():
    words = words_of([b"one two one", b"Two ONE"])
    assert words.hashes[0] == words.hashes[2] == words.hashes[4] != words.hashes[1] == words.hashes[3]
    hashes, first = shingles(words, 2)
    assert first.tolist() == [0, 1, 3] and hashes[1] == hashes[2] != hashes[0]
    many = words_of([b" ".join(b"w%d" % n for n in range(200_000))])
    assert len(np.unique(many.hashes)) == 200_000


@pytest.mark.parametrize("length", [1, 5, 13])
@pytest.mark.parametrize("size", [1, 50, 1000])
def test_a_long_document_has_the_same_runs_in_parts(length, size):
    choose = random.Random(6)
    words = [*VOCABULARY, "\u65e5\u672c\u8a9e", "\u00fcber", "---", "x" * 300]
    text = "".join(word + choose.choice([" ", ", ", "\n", "\u2014", "_"]) for word in choose.choices(words, k=2000))
    for document in (text.encode(), b"\xff lone \xed\xa0\x80 bytes " + text.encode(), b"", b"-" * 5000, b"one two"):
        whole, parts = words_of([document]), list(words_in_parts([document], size, length))
        found = [(part, *shingles(part, length)) for part in parts]
        hashes, first = shingles(whole, length)
        assert np.array_equal(np.concatenate([h for _, h, _ in found]), hashes)
        runs = [part.run(place, length) for part, _, places in found for place in places]
        assert runs == [whole.run(place, length) for place in first]
        assert max(len(part.text) for part in parts) < size + 300 * length + 400


def test_a_long_document_is_looked_at_as_a_short_one_is(tmp_path, monkeypatch):
    choose = random.Random(7)
    words = [f"word{n}" for n in range(5000)]
    long = choose.choices(words, k=3000)
    changed = [*long[:1500], "changed", *long[1501:]]
    files = write(tmp_path, [" ".join(long), "between", " ".join(changed), " ".join(long[::-1])], files=1)
    asked = [(f"item {n}", " ".join(long[n : n + 13])) for n in range(0, 2987, 7)]
    whole = inspection.contamination(files, asked), inspection.duplicates(files)
    monkeypatch.setattr(inspection, "BATCH_TEXT", 2_000)
    assert (inspection.contamination(files, asked), inspection.duplicates(files)) == whole
    assert len(whole[0].contaminated) == len(asked) and whole[1].near == 1


def test_copies_are_counted_exact_and_near(tmp_path):
    choose = random.Random(1)
    words = [f"word{n}" for n in range(5000)]
    distinct = [" ".join(choose.choices(words, k=300)) for _ in range(30)]
    near = [d.replace(d.split()[100], "changed", 1) for d in distinct[:5]]
    files = write(tmp_path, [*distinct, *near, *distinct[10:13], "", "two words"], files=1)
    found = inspection.duplicates(files)
    assert (found.documents, found.exact, found.compared, found.near) == (40, 3, 40, 8)
    assert inspection.duplicates(files, most=30).near == 0


def test_short_documents_of_several_batches_are_no_near_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "BATCH_TEXT", 5_000)
    choose = random.Random(1)
    words = [f"word{n}" for n in range(5000)]
    documents = []
    for n in range(6):
        documents += [f"short number {n}", *(" ".join(choose.choices(words, k=300)) for _ in range(5))]
    files = write(tmp_path, [*documents, documents[1]], files=1)
    assert len(list(inspection._batches(files))) > 3
    found = inspection.duplicates(files)
    assert (found.compared, found.exact, found.near) == (37, 1, 1)


def test_half_the_same_text_is_no_near_duplicate(tmp_path):
    choose = random.Random(2)
    words = [f"word{n}" for n in range(5000)]
    one, two, three = (" ".join(choose.choices(words, k=300)) for _ in range(3))
    assert inspection.duplicates(write(tmp_path, [f"{one} {two}", f"{one} {three}"], files=1)).near == 0


def tokenized(folder, documents: list[str], shard_tokens: int) -> tuple[list[str], str]:
    files = write(folder, documents, files=1)
    out = str(folder / "out")
    tokenization.tokenize(files, out, "c", shard_tokens, str(folder / "work"), 1, lambda *_: None)
    return files, out


def test_validation_documents_are_looked_for_among_the_others(tmp_path):
    choose = random.Random(3)
    documents = [" ".join(choose.choices([f"word{n}" for n in range(5000)], k=400)) for _ in range(20)]
    documents[15] = f"{documents[15]} {documents[0][:200]}"
    files, out = tokenized(tmp_path, documents, 4_000)
    found = inspection.validation_overlap(files, out)
    assert found.contaminated == ["doc 0 0"]
    assert found.examples[0].document == "doc 0 15"
    assert found.items + found.documents == 20


QUESTION = ("item", "the quick brown fox jumps over the lazy dog and then it sleeps for many hours in the sun")


def test_ids_that_repeat_in_each_file_hide_no_training_document(tmp_path):
    choose = random.Random(3)
    words = [f"word{n}" for n in range(5000)]
    texts = [[" ".join(choose.choices(words, k=400)) for _ in range(20)] for _ in range(3)]
    texts[2][1] = f"{QUESTION[1]} {texts[2][1]}"  # its id is that of a held-out document
    files = [str(tmp_path / f"{n:03d}.parquet") for n in range(3)]
    for file, part in zip(files, texts, strict=True):
        pq.write_table(pa.table({"text": part, "id": list(range(20))}), file)
    out = str(tmp_path / "out")
    tokenization.tokenize(files, out, "c", 4_000, str(tmp_path / "work"), 1, lambda *_: None)
    found = inspection.inspect(files, out, [QUESTION])
    assert found.contamination.contaminated == ["item"] and found.contamination.examples[0].document == "1"
    assert found.validation.contaminated == []
    assert found.contamination.documents == found.validation.documents == 60 - found.validation.items


def test_held_out_documents_of_one_id_are_counted_each(tmp_path):
    choose = random.Random(3)
    words = [f"word{n}" for n in range(5000)]
    documents = [" ".join(choose.choices(words, k=400)) for _ in range(20)]
    files = [str(tmp_path / f"{n:03d}.parquet") for n in range(2)]
    pq.write_table(pa.table({"text": documents[:2], "id": ["a", "b"]}), files[0])
    pq.write_table(pa.table({"text": [*documents[2:], *documents[:3]], "id": [*"ab"] * 10 + ["c"]}), files[1])
    out = str(tmp_path / "out")
    tokenization.tokenize(files, out, "c", 4_000, str(tmp_path / "work"), 1, lambda *_: None)
    found = inspection.inspect(files, out, [QUESTION]).validation
    assert found.contaminated == [f"{files[0]} row 0", f"{files[0]} row 1", f"{files[1]} row 0"]


def test_a_held_out_document_that_stands_again_under_its_id_is_found(tmp_path):
    choose = random.Random(3)
    words = [f"word{n}" for n in range(5000)]
    documents = [" ".join(choose.choices(words, k=400)) for _ in range(20)]
    file, out = str(tmp_path / "0.parquet"), str(tmp_path / "out")
    pq.write_table(pa.table({"text": [*documents, documents[0]], "id": [*map(str, range(20)), "0"]}), file)
    tokenization.tokenize([file], out, "c", 4_000, str(tmp_path / "work"), 1, lambda *_: None)
    assert inspection.validation_overlap([file], out).contaminated == ["0"]


def test_lengths_count_each_document_once(tmp_path):
    documents = ["hello " * n for n in (1, 7, 8, 100, 3000)]
    _, out = tokenized(tmp_path, documents, 1_000)
    found = inspection.lengths(out)
    sizes = [1 + len(tokenizer.encode(d)) for d in documents]
    assert (found.documents, found.tokens) == (5, sum(sizes))
    assert found.tokens_by_dump == [("d", sum(sizes))]
    assert found.histogram == [(2, 1), (8, 2), (64, 1), (2048, 1)]
    assert list(found.quantiles.values()) == [sizes[0], sizes[0], sizes[2], sizes[-1], sizes[-1]]
    with pytest.raises(ValueError, match="has no token shards"):
        inspection.lengths(str(tmp_path / "work"))


def test_all_of_it_becomes_numbers(tmp_path):
    choose = random.Random(3)
    documents = [" ".join(choose.choices([f"word{n}" for n in range(5000)], k=400)) for _ in range(20)]
    files, out = tokenized(tmp_path, [*documents, documents[3]], 4_000)
    copied = ("copied", " ".join(documents[7].split()[5:25]))
    found = inspection.numbers(inspection.inspect(files, out, [copied, ("other", "x " * 20)]))
    expected = {"items": 2, "contaminated_items": 1, "documents_with_items": 1, "exact_duplicates": 1}
    assert expected.items() <= found.items()
    assert found["near_duplicates_share"] == round(1 / 21, 4) and found["documents"] == 21


@pytest.mark.slow
def test_no_real_item_is_in_the_real_corpus_and_a_planted_one_is_found(shared_data):
    files = sorted(map(str, (shared_data / "fineweb_edu_style" / "sample").glob("*.parquet")))
    questions = inspection.item_texts(items.read_items(str(shared_data / "hellaswag_val.jsonl.gz")), "hellaswag")
    words = pq.read_table(files[3], columns=["text"])["text"][500].as_py().split()[40:60]
    found = inspection.contamination(files, [*questions, ("planted", " ".join(words).upper())])
    assert (found.items, found.documents, found.contaminated) == (10_043, 21_372, ["planted"])


def test_cores_items_are_those_of_the_bundle_where_it_is_at_hand(tmp_path):
    run = tiny_run.config()
    at = lambda folder: replace(run, evals=replace(run.evals, core=str(folder)))  # noqa: E731
    write_bundle(tmp_path / "there/eval_bundle")
    found = core_items(at(tmp_path / "there"))
    assert found == core_items(at(tmp_path / "there/eval_bundle")) == items.core_texts(f"{tmp_path}/there/eval_bundle")
    assert found and core_items(run) == core_items(at(tmp_path / "absent")) == []
