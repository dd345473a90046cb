"""A run that starts from weights learns from there, and its record leads to their files and the hub's commit."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gpt2
from tiny_pipeline import TINY_SETTINGS, Finished, copied, gpt2

from assets.baselines import asked_the_same, beside
from assets.card import outputs_of
from pipeline import runs
from pipeline.runs import silent_maker
from storage import objects, records, starting_weights
from storage.lineage import Lineage
from storage.places import places
from training.config import SUITES, to_dict

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def publish_in_cache(folder: Path, cache: Path, name: str) -> None:
    """A hub model as its client keeps it: what `gpt2 run` finds where there is no network."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fine_tuning_a_hub_model_is_traced_to_its_commit(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    tiny_gpt2.save(tmp_path / "model", context=64)
    publish_in_cache(tmp_path / "model", tmp_path / "cache", "openai-community/tiny-gpt2")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    sizes = ["--set", "layers=2", "--set", "train.dtype=fp32", "--set", "train.init_from=openai-community/tiny-gpt2"]
    arguments = ["run", "finetune", "--name", "tuned", "--corpus", "embedded", *TINY_SETTINGS, *sizes]
    done = gpt2(*arguments, "--only", "data", "--only", "training", "--store", store, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = records.read_record(store, "runs/tuned")
    assert trained is not None and trained.config["train"]["lr"] == 1e-4
    assert trained.metrics["skipped_updates"] == 0
    (parent,) = [p for p in trained.parents if p.key.startswith("weights/tiny-gpt2-")]
    weights = records.read_record(store, parent.key)
    assert weights is not None and weights.fingerprint == parent.fingerprint
    assert weights.metrics == {"source": "openai-community/tiny-gpt2", "revision": COMMIT}
    assert weights.config["files"]["model.safetensors"] == digest(tmp_path / "model/model.safetensors")
    index = Lineage(tmp_path / "anew.duckdb", store)  # which has what the store's records say, nothing else
    index.ingest(store)
    (node,) = [node for node in index.ancestry("tuned").inputs if node.key == parent.key]
    assert (node.job, node.replaced) == ("starting_weights", False)
    assert "runs/tuned" in [reached.key for reached in index.impact(parent.key)]
    assert index.ingest(store) == 0


@pytest.mark.parametrize("context, same", [(64, True), (32, False)])
def test_a_fine_tuned_run_stands_beside_another_where_its_loss_is_of_windows_as_long(
    finished: Finished, context: int, same: bool, tmp_path: Path
) -> None:
    maker = silent_maker(places(copied(finished.store, tmp_path)))
    tiny, store = maker.run_config("tiny"), maker.places.store
    tuned = replace(tiny, recipe="finetune", model=replace(tiny.model, context=context))
    objects.publish_json(f"{store}/runs/tuned/config.json", to_dict(tuned))
    ours = outputs_of(maker, "tiny")
    for score in (record for record in ours if record.asset in SUITES):
        records.write_record(store, replace(score, key=score.key.replace("tiny", "tuned")))
    (other,) = asked_the_same(maker, "tiny", ours)
    suites = {"completion_demo", "eleuther"} | ({"validation_loss"} if same else set())
    assert (other.name, {score.asset for score in other.scores}) == ("tuned", suites)
    assert bool(beside(maker, "tiny", ours)) == same


def test_the_same_content_is_the_same_weights_and_other_content_is_not(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    tiny_gpt2.save(one)
    shutil.copytree(one, copy)
    tiny_gpt2.save(other, seed=1)
    found = [starting_weights.resolve(str(place)).identity for place in (one, copy, other)]
    assert found[0] == found[1] != found[2]
    assert set(found[0]["files"]) == {"config.json", "model.safetensors"}


def test_what_cannot_be_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (str(tmp_path / "empty"), str(tmp_path / "missing"), "./no/such/place"):
        with pytest.raises(ValueError, match="init_from="):
            starting_weights.check(wrong)
    starting_weights.check("openai-community/gpt2-xl")
    tiny_gpt2.save(tmp_path / "model", context=64)
    config = runs.configure("finetune", [f"init_from={tmp_path}/model"], None, None)
    with pytest.raises(ValueError, match="--set layers=2 --set channels=32 --set heads=2 --set context=64"):
        runs.check_starting_weights(config)
