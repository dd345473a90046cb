"""A dataset on the hub moves; a run that has begun goes on with the commit it began with, and asks nothing again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_hub import LocalHub
from test_hub_files_come_whole import REPO, parquet, shard
from tiny_pipeline import TINY_SETTINGS, gpt2

from assets.corpus import documents_output
from assets.freshness import stages
from assets.making import Maker, Produced
from assets.resources import Launcher, Silent
from assets.trainer import claim_run
from storage import hub, objects, records, sources
from storage.places import places
from training import recipes

SHARDS = "karpathy/fineweb-edu-100B-gpt2-token-shards"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
        yield server


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(places(str(tmp_path / "store")), Launcher(), Silent())


def define(maker: Maker, run: str, corpus: str) -> None:
    maker.define(run, replace(recipes.recipe("demo"), corpus=corpus))


def texts(server: LocalHub, commit: str) -> None:
    server.publish(REPO, commit, {"sample/10BT/000_00000.parquet": parquet([f"{commit} {n} " * 9 for n in range(99)])})


@pytest.mark.parametrize("corpus", ["fineweb-edu-10B", "fineweb-edu-10B@main:1", f"datasets:{REPO}"])
def test_a_run_that_has_begun_takes_the_same_files_without_a_question(corpus, local, maker, tmp_path, monkeypatch):
    texts(local, "c0ffee")
    define(maker, "first", corpus)
    define(maker, "second", corpus)
    begun = maker.source("first")
    texts(local, "beef")
    local.requests.clear()
    again = maker.source("first")
    assert again == begun and local.requests == []
    if isinstance(again, sources.Hub):
        again.fetch(str(tmp_path / "out"), lambda *_: None)
        assert [path.split("/")[5] for _, path, _ in local.requests] == ["c0ffee"]
    assert maker.source("second").name != begun.name
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert maker.source("second").identity != maker.source("first").identity == begun.identity


def test_a_run_from_before_goes_on_with_its_documents(local, maker, monkeypatch):
    """One that has a record of its documents and nothing else that tells their commit."""
    texts(local, "c0ffee")
    define(maker, "old", "fineweb-edu-10B")
    source = sources.resolve("fineweb-edu-10B")
    output = documents_output(source)
    url = records.folder_url(maker.places.store, output.key)
    produced = Produced(files=source.fetch(url, lambda *_: None), metrics=source.details)
    record = maker._produce(output, lambda _: produced)
    records.write_record(maker.places.store, record)
    maker.remember_input("old", documents=output.key)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    again = maker.source("old")
    assert again == source and documents_output(again).fingerprint == record.fingerprint
    assert documents_output(again).reusable(maker.places.store)[0] == record


def test_what_a_folder_holds_is_looked_at_each_time(maker, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.parquet").write_bytes(parquet(["one"] * 9))
    define(maker, "run", str(tmp_path / "texts"))
    before = maker.source("run")
    (tmp_path / "texts/b.parquet").write_bytes(parquet(["two"] * 9))
    assert maker.source("run").name != before.name
    assert not objects.exists(objects.join(maker.places.store, "runs/run/source.json"))


@pytest.mark.slow
def test_shards_are_those_of_the_documents_and_a_run_needs_no_network(local, tmp_path, monkeypatch):
    def publish(commit: str, last: int) -> None:
        names = ["val_000000", "train_000001"]
        local.publish(SHARDS, commit, {f"edu_fineweb_{n}.bin": shard([50256, *[9] * 300, last]) for n in names})

    def run(*stages: str) -> None:
        only = [word for stage in stages for word in ("--only", stage)]
        corpus = ["--corpus", "fineweb-edu-100B-tokens", "--name", "r"]
        done = gpt2("run", *corpus, *TINY_SETTINGS, *only, "--store", str(store), cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    store = tmp_path / "store"
    publish("c0ffee", 1)
    run("documents")
    publish("beef", 2)
    run("token_shards")
    (made,) = store.glob("tokens/*/edu_fineweb_train_000001.bin")
    assert made.read_bytes() == local.repos[SHARDS]["c0ffee"]["edu_fineweb_train_000001.bin"]
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    run("documents", "token_shards")
    assert len([*store.glob("tokens/*/record.json")]) == 1


def folder_of_texts(folder: Path, *words: str) -> str:
    folder.mkdir(exist_ok=True)
    for number, word in enumerate(words):
        (folder / f"{number}.parquet").write_bytes(parquet([f"{word} {n} " * 9 for n in range(99)]))
    return str(folder)


def test_a_run_whose_training_has_begun_is_given_no_other_documents(maker, tmp_path):
    """Its tokens would be made, and its scores be on text that it was trained on, before training is refused."""
    define(maker, "first", folder_of_texts(tmp_path / "corpus", "one", "two"))
    maker.remember_input("first", documents=documents_output(maker.source("first")).key)
    folder_of_texts(tmp_path / "corpus", "one", "three")
    changed = documents_output(maker.source("first")).key
    maker.remember_input("first", documents=changed)
    claim_run(maker, "first", "its definition")
    folder_of_texts(tmp_path / "corpus", "one", "four")
    with pytest.raises(ValueError, match=f"run 'first' was trained on {changed}, and its corpus is corpora/corpus-"):
        maker.source("first")
    again = gpt2("run", "--name", "first", "--corpus", "corpus", "--store", maker.places.store, cwd=tmp_path)
    assert again.returncode == 2 and "run 'first' was trained on" in again.stderr, again.stderr
    assert maker.inputs("first") == {"documents": changed}
    assert stages(maker, "first")[0].reason.startswith("run 'first' was trained on")


def test_a_folder_of_documents_may_move(maker, tmp_path):
    """Other commands and Dagster's page, which work elsewhere, find it; a run goes on where it lies now."""
    data = ("--only", "documents", "--store", maker.places.store)
    folder_of_texts(tmp_path / "corpus", "one", "two")
    made = gpt2("run", "--name", "first", "--corpus", "corpus", *data, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert maker.run_config("first").corpus == str(tmp_path / "corpus")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus").rename(tmp_path / "elsewhere/corpus")
    again = gpt2("run", "--name", "first", "--corpus", "corpus", *data, cwd=tmp_path / "elsewhere")
    assert again.returncode == 0, again.stderr
    assert maker.source("first").details == {"url": str(tmp_path / "elsewhere/corpus")}
