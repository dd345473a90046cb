"""From a run's step to the documents in its batch, and back: as the trainer's own loader reads them."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.seen import readers
from storage import documents, objects, records, shards, tokenizer
from storage.lineage import Lineage
from storage.places import places
from storage.records import File, Parent, Record
from training import recipes, tokenization, trace
from training.loader import training_loader
from training.model_config import ModelConfig

CONTEXT = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Documents of one word each, so that every token names its document."""
    folder = tmp_path_factory.mktemp("trace")
    choose = random.Random(8)
    texts = [f" {chr(97 + n % 26)}" * choose.randrange(1, 150) for n in range(200)]
    table = pa.table({"text": texts, "id": [f"id {n}" for n in range(200)], "url": [f"u/{n}" for n in range(200)]})
    pq.write_table(table, folder / "documents.parquet", row_group_size=30)
    out = str(folder / "out")
    file = str(folder / "documents.parquet")
    tokenization.tokenize([file], out, "my_train_and_val_set", 3_000, str(folder / "work"), 1, lambda *_: None)
    return out


@pytest.fixture
def config():
    base = recipes.recipe("demo")
    model = ModelConfig(layers=1, channels=8, heads=1, context=CONTEXT)
    return replace(base, model=model, train=replace(base.train, steps=60, batch_tokens=4 * CONTEXT))


def batch_of(tokens: str, config, step: int) -> list[int]:
    load = training_loader(tokens, CONTEXT, config.train.order_seed, config.train.shuffle, torch.device("cpu"))
    return load(list(range(step * 4, (step + 1) * 4)))[0].flatten().tolist()


@pytest.mark.parametrize("step", [0, 7, 50, 59])
def test_a_steps_documents_are_those_of_its_batch(tokens, config, step):
    seen = trace.documents_of_step(tokens, config, step)
    batch = batch_of(tokens, config, step)
    assert sum(s.tokens for s in seen) == len(batch) == 4 * CONTEXT
    words = {token for token in batch if token != tokenizer.EOT}
    numbers = [int(s.id.removeprefix("id ")) for s in seen]
    assert {int(tokenizer.encode(f" {chr(97 + n % 26)}")[0]) for n in numbers} >= words
    for word in words:  # tokens of the documents of a word, their EOTs aside
        letters = [s for s, n in zip(seen, numbers, strict=True) if tokenizer.encode(f" {chr(97 + n % 26)}")[0] == word]
        assert 0 <= sum(s.tokens for s in letters) - batch.count(word) <= len(letters)
    assert all(s.url == f"u/{n}" and s.row == n for s, n in zip(seen, numbers, strict=True))


def test_the_steps_of_a_document_are_those_that_name_it(tokens, config):
    named: dict[str, list[int]] = {}
    for step in range(60):
        for seen in trace.documents_of_step(tokens, config, step):
            named.setdefault(seen.id, []).append(step)
    for document in list(named)[::9]:
        assert steps_of(tokens, config, document) == named[document]
        assert steps_of(tokens, config, document.replace("id ", "u/")) == named[document]


def steps_of(tokens: str, config, document: str, **known) -> list[int]:
    """By the lookup that the command uses."""
    store, key = tokens.rsplit("/", 1)
    files = [File(s.path, 0, "", "") for s in objects.list_files(tokens)]
    record = Record("token_shards", key, "f" * 64, "1", {}, [], files, "", "")
    with tempfile.TemporaryDirectory(prefix="somebody's ") as home:
        places = documents.find(store, record, Path(home), document)
    return trace.steps_of_places(tokens, config, [(p.shard, p.start, p.tokens) for p in places], **known)


def test_a_run_that_left_data_out_is_traced_by_its_metrics(tokens, config):
    """As after a rewind: from step 30 on it reads 8 sequences further on in the order."""
    positions = {step: 4 * step + (8 if step >= 30 else 0) for step in range(60)}
    assert trace.documents_of_step(tokens, config, 40, positions) == trace.documents_of_step(tokens, config, 42)
    for document in ("id 30", "id 77", "id 120"):
        seen = [trace.documents_of_step(tokens, config, step, positions) for step in range(60)]
        there = [step for step, found in enumerate(seen) if document in [d.id for d in found]]
        assert steps_of(tokens, config, document, positions=positions) == there


def test_a_run_that_overfits_sees_its_first_batch(tokens, config):
    overfit = replace(config, train=replace(config.train, overfit=True))
    first = trace.documents_of_step(tokens, config, 0)
    assert trace.documents_of_step(tokens, overfit, 40) == first
    assert steps_of(tokens, overfit, first[0].id) == [*range(60)]


def test_it_works_on_s3(tokens, config, s3_store, tmp_path):
    place = f"{s3_store}/tokens/c"
    objects.copy_tree(tokens, place)
    seen = trace.documents_of_step(place, config, 9)
    assert seen == trace.documents_of_step(tokens, config, 9)
    assert steps_of(place, config, seen[0].url) == steps_of(tokens, config, seen[0].url)
    names = [s.path for s in objects.list_files(place, ".parquet")]
    files = [records.describe_file(place, name) for name in names]
    mark = records.fingerprint("token_shards", "1", {}, [])
    when = "2026-11-24T10:00:00+00:00"
    records.write_record(s3_store, Record("token_shards", "tokens/c", mark, "1", {}, [], files, when, when))
    lineage = Lineage(tmp_path / "lineage.duckdb")
    lineage.ingest(s3_store)
    query = "SELECT DISTINCT id, url FROM documents WHERE url = 'u/77'"
    assert lineage.sql(query, [s3_store])[1] == [("id 77", "u/77")]


def test_shards_that_were_tokenized_elsewhere_hide_no_reader_of_a_document(tokens, tmp_path, capsys):
    place = places(str(tmp_path / "store"))
    objects.copy_tree(tokens, f"{place.store}/tokens/c")
    names = [s.path for s in objects.list_files(tokens, ".parquet")]
    files = [records.describe_file(f"{place.store}/tokens/c", name) for name in names]

    def make(key: str, asset: str, files: list[File], *parents: Parent) -> Parent:
        when, mark = "2026-11-24T10:00:00+00:00", records.fingerprint(asset, "1", {"key": key}, list(parents))
        records.write_record(place.store, Record(asset, key, mark, "1", {}, list(parents), files, when, when))
        return Parent(key, mark)

    make("tokens/b", "token_shards", [])
    make("tokens/c/inspection-1", "inspection", [], make("tokens/c", "token_shards", files))
    index = Lineage(place.lineage, place.store)
    index.ingest(place.store)
    held_out = next(f for f in files if "_val_" in f.path)
    (document,) = pq.read_table(f"{place.store}/tokens/c/{held_out.path}")["url"].to_pylist()[:1]
    assert [node.key for node in readers(place, index, document)] == ["tokens/c/inspection-1"]
    assert capsys.readouterr().err == "passed over tokens/b: its shards have no index of their documents\n"


def test_what_can_not_be_traced_is_said(tokens, config, tmp_path):
    with pytest.raises(ValueError, match="no step 60, only 0 to 59"):
        trace.documents_of_step(tokens, config, 60)
    assert steps_of(tokens, config, "id 9999") == []
    shards.write_shard(str(tmp_path / "e_train_000001.bin"), tokenizer.encode("word " * 1000))
    with pytest.raises(ValueError, match="tokenized elsewhere"):
        trace.documents_of_step(str(tmp_path), config, 1)
