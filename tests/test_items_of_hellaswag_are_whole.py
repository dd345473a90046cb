"""HellaSwag's items are read in both schemas and from the hub; what is not the published set is refused."""

import gzip
import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import LocalHub

from assets.corpus import HAS_ITEMS
from assets.items import hellaswag_items
from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import Launcher, Silent
from storage import hub, items, objects, shards, tokenizer
from storage.places import Places
from training.config import EvalConfig

RAW = {  # as published: the example in llm.c's dev/data/hellaswag.py
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": ["is using wrap.", "is ripping tiles.", "is holding a cube.", "starts pulling up roofing."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}
CLEANED = {key: RAW[key] for key in ("ind", "activity_label", "ctx", "split", "endings", "label")}


@pytest.mark.parametrize("item", [RAW, CLEANED], ids=["raw", "cleaned"])
@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_both_schemas_are_understood(tmp_path, item, name):
    data = (json.dumps(item) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert items.read_items(str(tmp_path / name)) == [item]


def test_items_are_kept_as_llm_c_tokenizes_them(tmp_path):
    written = items.write_items([RAW], str(tmp_path))
    assert [f.path for f in written] == ["items.jsonl", "items.bin"]
    assert items.read_items(str(tmp_path / "items.jsonl")) == [RAW]
    choice = shards.read_choices(str(tmp_path / "items.bin"))[0]
    assert tokenizer.encoding().decode(list(choice.context)) == RAW["ctx"]
    assert [tokenizer.encoding().decode(list(e)) for e in choice.endings] == [f" {e}" for e in RAW["endings"]]
    assert choice.label == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 1, is no JSON object"),
        ("[1, 2]", r"line 1, is no JSON object"),
        (json.dumps(RAW | {"label": ""}), r"item 1, has no label"),
        (json.dumps(RAW | {"endings": ["a", "b"]}), r"has 2 endings and label 3"),
        (json.dumps(RAW | {"label": 4}), r"label 4, not four endings"),
        (json.dumps(RAW | {"label": "B"}), r"label B, not four endings"),
        (json.dumps(RAW | {"endings": 4}), r"has 0 endings and label 3"),
    ],
)
def test_an_item_that_is_not_whole_is_named(tmp_path, line, message):
    (tmp_path / "items.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        items.read_items(str(tmp_path / "items.jsonl"))


@pytest.mark.parametrize(
    "made, passed", [([RAW] * 4, True), ([RAW] * 3, False), ([*[RAW] * 4, RAW | {"endings": ["a", "b", "c"]}], False)]
)
def test_the_check_of_items_reads_them(tmp_path, made, passed):
    store, output = str(tmp_path / "store"), Output("eval_items", "eval_items/c", "1", {})
    maker = Maker(Places(store, tmp_path / "home"), Launcher(), Silent())
    lines = "".join(json.dumps(item) + "\n" for item in made)
    objects.publish_bytes(f"{maker.folder(output.key)}/items.jsonl", lines.encode())
    found = Produced(["items.jsonl"], rows=len(made))
    _, (check,) = maker.make(StageConfig(), output, lambda _: found, [HAS_ITEMS])
    assert check.passed == passed


def test_another_number_of_items_is_not_hellaswag(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(RAW))
    with pytest.raises(ValueError, match=r"has 1 items, 0 of them repeated: .* has 10,042"):
        items.hellaswag(str(tmp_path / "items.jsonl"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="10,042 items, 10,041 of them repeated"):
        items.check_hellaswag([RAW] * 10_042, "copies")
    with pytest.raises(ValueError, match="no items at"):
        items.hellaswag(str(tmp_path / "absent.jsonl"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def hubs_copy(words: str) -> dict[str, bytes]:
    sink = io.BytesIO()
    rows = [RAW | {"label": str(n), "ctx": f"{words} {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return {"data/validation-00000-of-00001.parquet": sink.getvalue(), "data/test-00000-of-00001.parquet": b""}


@pytest.fixture
def on_the_hub(monkeypatch):
    """Three items, on a hub."""
    monkeypatch.setattr(items, "HELLASWAG_ITEMS", 3)
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
    with LocalHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.publish("Rowan/hellaswag", "c0ffee", hubs_copy("context"))
        yield server


def test_the_hubs_copy_is_read(on_the_hub, tmp_path):
    items.hellaswag("hub", str(tmp_path), revision=items.revision_of("hub"))
    assert [i["label"] for i in items.read_items(str(tmp_path / "items.jsonl"))] == [0, 1, 2]


def test_a_store_keeps_the_commit_that_it_first_had(on_the_hub, tmp_path):
    """Scores name the items by a fingerprint that holds it."""
    maker = Maker(Places(str(tmp_path / "store"), tmp_path / "home"), Launcher(), Silent())
    settings = EvalConfig(hellaswag="hub")
    first = hellaswag_items(maker, StageConfig(), settings)
    assert first.config["revision"] == "c0ffee"
    on_the_hub.publish("Rowan/hellaswag", "beef", hubs_copy("changed"))
    on_the_hub.requests.clear()
    assert hellaswag_items(maker, StageConfig(), settings) == first
    assert on_the_hub.requests == []  # so that it needs no network
    anew = hellaswag_items(maker, StageConfig(recompute=True), settings)
    assert anew.config["revision"] == "beef" and anew.fingerprint != first.fingerprint
    assert anew.key == first.key == "eval_items/hellaswag-hub"


def test_all_real_items_are_there(shared_data, tmp_path):
    items.hellaswag(str(shared_data / "hellaswag_val.jsonl.gz"), str(tmp_path))
    choices = shards.read_choices(str(tmp_path / "items.bin"))
    assert len(choices) == 10_042
    assert [sum(c.label == n for c in choices) for n in range(4)] == [2515, 2485, 2584, 2458]


@pytest.fixture
def published(monkeypatch):
    """Three items, published as HellaSwag's jsonl is."""
    data = "".join(json.dumps(RAW | {"ctx": f"context {n}"}) + "\n" for n in range(3)).encode()
    monkeypatch.setattr(items, "HELLASWAG_ITEMS", 3)
    monkeypatch.setattr(items, "HELLASWAG_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
    with LocalHub(files={items.HELLASWAG_FILE: data}) as server:
        monkeypatch.setenv("GPT2_GITHUB_RAW", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_the_published_file_is_fetched_resumed_and_checked(published, tmp_path):
    published.cut_after = 200
    items.hellaswag("published", str(tmp_path / "out"), str(tmp_path / "scratch"))
    assert [i["ctx"] for i in items.read_items(str(tmp_path / "out/items.jsonl"))] == [f"context {n}" for n in range(3)]
    assert "bytes=200-" in [r for _, _, r in published.requests]
    assert set(published.tokens_seen) == {""}  # the hub's token is for the hub
    published.requests.clear()
    items.hellaswag("published", str(tmp_path / "again"), str(tmp_path / "scratch"))
    assert published.requests == []


def test_other_bytes_than_the_published_ones_are_refused(published, tmp_path):
    published.files[items.HELLASWAG_FILE] += b"\n"
    with pytest.raises(ValueError, match="twice came with sha256"):
        items.hellaswag("published", str(tmp_path / "out"), str(tmp_path / "scratch"))


def test_without_a_network_it_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_GITHUB_RAW", "http://127.0.0.1:9")
    with pytest.raises(hub.Unreachable, match="check the network"):
        items.hellaswag("published", str(tmp_path / "out"), str(tmp_path / "scratch"))


def test_items_come_through_the_datasets_library(monkeypatch, tmp_path):
    monkeypatch.setattr(items, "HELLASWAG_ITEMS", 3)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [RAW | {"label": str(n), "ctx": f"context {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/validation-00000-of-00001.parquet")
    items.hellaswag(f"datasets:{tmp_path}/set", str(tmp_path / "out"))
    assert [i["label"] for i in items.read_items(str(tmp_path / "out/items.jsonl"))] == [0, 1, 2]
    version = items.hellaswag_version(f"datasets:{tmp_path}/set")
    assert len(version) == 64 and items.revision_of(f"datasets:{tmp_path}/set") == ""  # a folder has no commits
