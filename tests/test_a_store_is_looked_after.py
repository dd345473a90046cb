"""`gpt2 store verify` and `gc`: what is wrong is found and named, what nothing needs goes, what a run needs stays."""

import json
import os
import shutil
import time

import dagster as dg
import pytest
import typer
from tiny_pipeline import gpt2

from pipeline import definitions, runs, sensors
from pipeline.commands.store import verify
from storage import garbage, integrity, objects, records
from storage.contents import FOLDERS
from storage.places import places
from storage.records import Parent, Record
from training import recipes
from training.config import to_dict

CONFIG = {"recipe": "demo", "corpus": "c", "train": {"steps": 2, "batch_tokens": 64}}
LATER = time.time() + 10 * 86400  # as of which everything here is old


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_store")


def make(store: str, key: str, *parents: Parent, names: tuple[str, ...] = ("data.bin",)) -> Parent:
    for name in names:
        objects.publish_bytes(objects.join(records.folder_url(store, key), name), f"{key} {name}".encode())
    files = [records.describe_file(records.folder_url(store, key), name) for name in names]
    mark = records.fingerprint("a", "1", {"key": key}, list(parents))
    records.write_record(store, Record("a", key, mark, "1", {"key": key}, list(parents), files, "", ""))
    return Parent(key, mark)


@pytest.fixture
def chain(store) -> str:
    """Documents, tokens, weights, an export and a score; the run's own files beside them."""
    tokens = make(
        store, "tokens/c", make(store, "corpora/c/documents"), names=("c_val_000000.bin", "c_train_000001.bin")
    )
    weights = make(store, "runs/r", tokens, names=("main.log", "checkpoints/step_000002/DONE"))
    make(store, "runs/r/scores/s", make(store, "runs/r/export", weights), names=("s.json", "s.parquet"))
    objects.publish_json(objects.join(store, "runs/r/config.json"), CONFIG)
    for path in (
        "runs/r/inputs.json",
        "runs/r/checkpoints/step_000001/DONE",
        "tokens/c/plan.json",
    ):
        objects.publish_json(objects.join(store, path), {})
    return store


def problems(store: str) -> list[tuple[str, str]]:
    return [(p.kind, p.path) for p in integrity.verify(store, FOLDERS).problems]


def test_a_whole_store_has_no_problem(chain):
    found = integrity.verify(chain, FOLDERS)
    assert (found.outputs, found.files, found.problems) == (5, 8, [])


def test_a_flipped_byte_a_missing_and_a_foreign_file_are_found_with_what_depends_on_them(chain):
    shard = objects.join(chain, "tokens/c/c_train_000001.bin")
    data = bytearray(objects.read_bytes(shard))
    data[3] ^= 1
    objects.publish_bytes(shard, bytes(data))
    objects.remove(objects.join(chain, "runs/r/export/data.bin"))
    objects.publish_bytes(objects.join(chain, "runs/r/scores/s.old.json"), b"{}")
    objects.publish_bytes(objects.join(chain, "corpora/c/documents/copy.bin"), b"1")
    found = {p.path: p for p in integrity.verify(chain, FOLDERS).problems}
    assert {path: p.kind for path, p in found.items()} == {
        "tokens/c/c_train_000001.bin": "changed",
        "runs/r/export/data.bin": "missing",
        "runs/r/scores/s.old.json": "foreign",
        "corpora/c/documents/copy.bin": "foreign",
    }
    assert found["tokens/c/c_train_000001.bin"].dependents == ("runs/r", "runs/r/export", "runs/r/scores/s")
    assert found["runs/r/export/data.bin"].dependents == ("runs/r/scores/s",)


def test_the_weights_that_a_run_starts_from_are_checked_too(chain, tmp_path):
    """Their bytes lie outside the store; what was made from them is told."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    files = [records.describe_file("", str(tmp_path / "model.safetensors"))]
    mark = records.fingerprint("starting_weights", "1", {}, [])
    records.write_record(chain, Record("starting_weights", "weights/m", mark, "1", {}, [], files, "", ""))
    make(chain, "runs/tuned", Parent("weights/m", mark))
    assert problems(chain) == [] and "weights/m" not in collected(chain, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    (problem,) = integrity.verify(chain, FOLDERS).problems
    assert (problem.key, problem.dependents) == ("weights/m", ("runs/tuned",))


def test_files_that_belong_to_nothing_are_found_and_those_under_way_are_not(chain):
    put = lambda *paths: [objects.publish_bytes(objects.join(chain, path), b"1") for path in paths]  # noqa: E731
    put("runs/r/checkpoints/step_000001/evil.bin", "runs/r/checkpoints/evil.bin")
    unfinished = ["runs/r/scores/notes.txt", "runs/r/extra/x.bin", "corpora/stray/documents/x.parquet"]
    put(*unfinished, "tokens/stray/a.bin", "tokens/stray/plan.json")
    assert sorted(problems(chain)) == sorted(
        [("unfinished", path) for path in (*unfinished, "tokens/stray/a.bin")]
        + [("foreign", f"runs/r/checkpoints/{name}") for name in ("step_000001/evil.bin", "evil.bin")]
    )
    awaited = [f"runs/r/{stage}" for stage in ("scores/notes", "extra")]
    put(".claims/corpora/stray/documents/000001", ".claims/tokens/stray/000000")
    found = integrity.verify(chain, FOLDERS, awaited=awaited).problems
    assert {p.kind for p in found} == {"foreign"}
    put("runs/new/config.json", "runs/new/main.log", ".claims/training/new/000000")
    found = integrity.verify(chain, FOLDERS, awaited=awaited).problems
    assert [p.path for p in found if p.kind == "unfinished"] == []


def test_what_lies_outside_the_store_is_named_in_full(chain, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"text")
    files = [records.describe_file("", str(tmp_path / "a.parquet"))]
    mark = records.fingerprint("documents", "1", {}, [])
    records.write_record(chain, Record("documents", "corpora/o/documents", mark, "1", {}, [], files, "", ""))
    (tmp_path / "a.parquet").unlink()
    assert problems(chain) == [("missing", str(tmp_path / "a.parquet"))]


def test_records_are_checked_too(chain):
    url = records.record_url(chain, "tokens/c")
    data = objects.read_json(url)
    objects.publish_json(url, data | {"config": {"key": "another"}})
    assert problems(chain) == [("record", "tokens/c: its record")]
    objects.publish_bytes(url, objects.read_bytes(url)[:-20])
    assert ("record", "tokens/c/record.json") in problems(chain)
    assert {kind for kind, _ in problems(chain)} == {"record", "foreign"}  # nobody vouches for its files now
    objects.publish_json(objects.join(chain, "runs/r/config.json"), {"recipe": "demo", "corpus": "c", "train": {}})
    assert ("config", "runs/r/config.json") in problems(chain)


def test_a_number_that_was_changed_in_a_record_is_found(chain):
    url = records.record_url(chain, "runs/r/scores/s")
    data = objects.read_json(url)
    objects.publish_json(url, data | {"metrics": {"scores": {"acc": {"value": 0.99}}}})
    assert problems(chain) == [("record", "runs/r/scores/s: its record")]
    objects.publish_json(url, {name: value for name, value in data.items() if name != "digest"})
    assert problems(chain) == []  # as older versions wrote it


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "many"},
        {"files": [{"path": "data.bin", "bytes": "12", "modified": "1", "sha256": "ab"}]},
        {"files": ["data.bin"]},
        {"parents": [{"key": 1, "fingerprint": "a"}]},
        {"cost": {"seconds": "long"}},
        {"checks": {"finite": {"passed": "yes"}}},
        {"metrics": []},
    ],
)
def test_a_record_with_a_value_of_another_kind_is_named(tmp_path, change):
    make(str(tmp_path), "eval_items/i")
    url = records.record_url(str(tmp_path), "eval_items/i")
    objects.publish_json(url, objects.read_json(url) | change)
    with pytest.raises(ValueError, match=f"record.json.*{[*change][0]}"):
        records.read_record(str(tmp_path), "eval_items/i")
    assert ("record", "eval_items/i/record.json") in problems(str(tmp_path))
    assert collected(str(tmp_path), tmp_path / "home") == {}  # nobody knows what lies there


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_checked(tmp_path):
    make(str(tmp_path), "eval_items/i", names=("a.bin", "b.bin"))
    (tmp_path / "eval_items/i/a.bin").unlink()
    (tmp_path / "eval_items/i/a.bin").mkdir()  # of the size that its record says or not
    size = (tmp_path / "eval_items/i/a.bin").stat().st_size
    url = records.record_url(str(tmp_path), "eval_items/i")
    data = objects.read_json(url)
    del data["digest"]
    objects.publish_json(url, data | {"files": [data["files"][0] | {"bytes": size}, data["files"][1]]})
    (tmp_path / "eval_items/i/b.bin").write_bytes(b"changed")
    assert problems(str(tmp_path)) == [("unreadable", "eval_items/i/a.bin"), ("changed", "eval_items/i/b.bin")]


def test_a_copied_folder_is_named_and_vouches_for_nothing(chain, tmp_path):
    objects.copy_tree(objects.join(chain, "runs/r"), objects.join(chain, "runs/copy"))
    found = {p.path: p for p in integrity.verify(chain, FOLDERS).problems if p.kind == "record"}
    assert found.keys() == {f"runs/copy/{name}record.json" for name in ("", "export/", "scores/s.")}
    assert "it is the record of runs/r, whose folder was copied" in found["runs/copy/record.json"].what
    assert records.read_record(chain, "runs/copy") is None and records.read_record(chain, "runs/r")
    assert collected(chain, tmp_path) == {}
    objects.remove_tree(objects.join(chain, "runs/copy"))
    assert problems(chain) == []


def collected(store: str, home, needed=(), before=LATER, busy=()) -> dict[str, str]:
    return {g.name: g.what for g in garbage.find(store, home, needed, before, FOLDERS, busy)}


def test_a_file_is_named_as_it_is(chain, capsys):
    objects.publish_bytes(f"{chain}/corpora/c/documents/[old]/b[/a].bin", b"")
    with pytest.raises(typer.Exit):
        verify(chain)
    assert "corpora/c/documents/[old]/b[/a].bin" in capsys.readouterr().out


def test_what_a_run_refers_to_stays(chain, tmp_path):
    assert collected(chain, tmp_path) == {}
    make(chain, "eval_items/old")
    make(chain, "tokens/d", make(chain, "corpora/d/documents"))
    superseded = {"eval_items/old": "superseded output", "tokens/d": "superseded output"}
    assert collected(chain, tmp_path) == superseded | {"corpora/d/documents": "superseded output"}
    assert collected(chain, tmp_path, needed=["eval_items/old", "tokens/d"]) == {}  # with what it was made from
    assert collected(chain, tmp_path, before=time.time() - 3600) == {}


def test_a_corpus_that_lies_in_the_store_is_kept(chain, tmp_path):
    """Its record has it by its path or URL; what else a user keeps beside the outputs is nobody's garbage."""
    for path in ("data/mine/a.parquet", "corpora/mine/a.parquet", "data/notes.txt"):
        objects.publish_bytes(objects.join(chain, path), b"text")
    files = [records.describe_file("", objects.join(chain, p, "a.parquet")) for p in ("data/mine", "corpora/mine")]
    mark = records.fingerprint("documents", "1", {}, [])
    records.write_record(chain, Record("documents", "corpora/m-1/documents", mark, "1", {}, [], files, "", ""))
    top = {s.path.split("/")[0] for s in objects.list_files(chain)}
    listed = garbage.find(chain, tmp_path, ["corpora/m-1/documents"], LATER, top)
    assert listed == []
    assert [(p.kind, p.path) for p in integrity.verify(chain, top).problems] == [("foreign", "data/notes.txt")]


def test_a_corpus_in_the_store_by_another_path_to_it_is_kept(tmp_path):
    store = tmp_path / "disk" / "store"
    objects.publish_bytes(f"{store}/corpora/mine/a.parquet", b"text")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    files = [records.describe_file("", f"{tmp_path}/link/store/corpora/mine/a.parquet")]
    mark = records.fingerprint("documents", "1", {}, [])
    records.write_record(str(store), Record("documents", "corpora/m/documents", mark, "1", {}, [], files, "", ""))
    assert collected(str(store), tmp_path, ["corpora/m/documents"]) == {} and problems(str(store)) == []


def test_what_was_left_half_done_goes(chain, tmp_path):
    left = {
        "runs/r/.main.log.0a1b2c3d.partial": "unfinished upload",
        "runs/r/checkpoints/.step_000003/model.safetensors": "torn checkpoint",
        "tokens/c/pieces/claims/shard-000001/000000": "orphan claims",
        "tokens/e/plan.json": "unfinished output",
        "runs/unfinished/checkpoints/.step_000001/model.safetensors": "torn checkpoint",
        "runs/r/scores/notes.txt": "unfinished output",
        "corpora/c/documents/copy.bin": "foreign file",
    }
    objects.publish_json(objects.join(chain, "runs/unfinished/config.json"), CONFIG)
    for path in (*left, "runs/unfinished/checkpoints/step_000001/DONE"):
        objects.publish_bytes(objects.join(chain, path), b"1")
    found = garbage.find(chain, tmp_path, (), LATER, FOLDERS)
    assert {path: g.what for g in found for path in g.paths} == left
    assert not any(g.name.startswith("runs/r/") for g in garbage.find(chain, tmp_path, (), LATER, FOLDERS, ["r"]))
    garbage.remove(chain, found)
    assert collected(chain, tmp_path) == {}
    assert integrity.verify(chain, FOLDERS, awaited=["runs/unfinished"]).problems == []
    assert objects.exists(objects.join(chain, "runs/unfinished/checkpoints/step_000001/DONE"))  # it can be resumed


def test_uploads_that_never_ended_are_given_up(s3_store, tmp_path):
    bucket = s3_store.split("/")[2]
    client = objects.s3()
    client.call_s3("create_multipart_upload", Bucket=bucket, Key="store/runs/r/big.bin")
    found = garbage.find(s3_store, tmp_path, (), LATER, FOLDERS)
    assert [(g.what, g.name) for g in found] == [("unfinished upload", "runs/r/big.bin")]
    garbage.remove(s3_store, found)
    assert objects.unfinished_uploads(s3_store) == []


def test_the_commands_say_and_do_it(finished, tmp_path):
    """On a finished run: whole, then with a file gone; garbage is asked about, kept at first, deleted with --yes."""
    store = tmp_path / "store"
    shutil.copytree(finished.store, store)  # with its files' times
    whole = gpt2("store", "verify", "--store", str(store), cwd=tmp_path)
    assert (whole.returncode, "all is as recorded: 11 outputs" in whole.stdout) == (0, True), whole.stdout
    (store / "runs/tiny/export/config.json").unlink()
    (store / "tokens/old").mkdir()
    (store / "tokens/old/plan.json").write_text("{}")
    broken = gpt2("store", "verify", "--store", str(store), "--json", cwd=tmp_path)
    assert broken.returncode == 1
    left, problem = json.loads(broken.stdout)["problems"]
    assert (problem["kind"], problem["path"]) == ("missing", "runs/tiny/export/config.json")
    assert (left["kind"], left["path"]) == ("unfinished", "tokens/old/plan.json")
    assert "runs/tiny/scores/completion_demo" in problem["dependents"]
    assert json.loads(gpt2("store", "gc", "--store", str(store), "--json", cwd=tmp_path).stdout)["garbage"] == []  # new
    refused = gpt2("store", "gc", "--hours", "0.5", "--store", str(store), cwd=tmp_path)
    assert refused.returncode == 2 and "running run" in refused.stderr
    old = time.time() - 3 * 86400
    os.utime(store / "tokens/old/plan.json", (old, old))
    listed = json.loads(gpt2("store", "gc", "--store", str(store), "--json", cwd=tmp_path).stdout)
    assert (listed["deleted"], [g["name"] for g in listed["garbage"]]) == (False, ["tokens/old"])
    assert (store / "tokens/old/plan.json").exists()
    before = {path for path in store.rglob("*") if path.is_file() and path.parts[-2] != "old"}
    deleted = json.loads(gpt2("store", "gc", "--store", str(store), "--json", "--yes", cwd=tmp_path).stdout)
    assert deleted == listed | {"deleted": True}
    assert not (store / "tokens/old").exists()
    assert all(path.exists() for path in before if "dagster" not in path.parts)  # and nothing else


def test_a_run_whose_corpus_is_gone_keeps_every_corpus(finished, tmp_path):
    """What it would read is not known: nothing is listed that it may mean, and that is said."""
    store = tmp_path / "store"
    shutil.copytree(finished.store, store, ignore=shutil.ignore_patterns("dagster"))
    (store / "corpora/other").mkdir()
    shutil.copytree(store / "runs/tiny", store / "runs/lost", ignore=lambda *_: ["inputs.json", "record.json"])
    config = objects.read_json(f"{store}/runs/lost/config.json") | {"corpus": str(tmp_path / "gone")}
    objects.publish_json(f"{store}/runs/lost/config.json", config)
    make(str(store), "corpora/other/documents")
    old = time.time() - 3 * 86400
    for path in (store / "corpora/other").rglob("*"):
        os.utime(path, (old, old))
    kept = gpt2("store", "gc", "--store", str(store), "--json", cwd=tmp_path)
    assert json.loads(kept.stdout)["garbage"] == [] and "gone" in kept.stderr and "every corpus is kept" in kept.stderr
    shutil.rmtree(store / "runs/lost")
    gone = gpt2("store", "gc", "--store", str(store), "--json", cwd=tmp_path)
    assert [g["name"] for g in json.loads(gone.stdout)["garbage"]] == ["corpora/other/documents"]


@pytest.mark.parametrize("broken", ["config.json", "inputs.json"])
def test_a_run_that_cannot_be_read_costs_no_other_its_answers(broken, tmp_path, monkeypatch):
    """It is named with its file; only what may delete what it needs refuses."""
    store, recipe = str(tmp_path / "store"), to_dict(recipes.recipe("demo"))
    for run in ("well", "broken"):
        objects.publish_json(f"{store}/runs/{run}/config.json", recipe)
        objects.publish_json(f"{store}/runs/{run}/old_config.json", recipe)
    file = f"{store}/runs/broken/{broken}"
    objects.publish_bytes(file, b'{"recipe": ')
    place = places(store)
    assert runs.known_runs(place) == ["broken", "well"]
    told = gpt2("store", "status", "--store", store, "--json", cwd=tmp_path)
    shown = {s["run"] for s in json.loads(told.stdout)}
    assert shown == ({"well"} if broken == "config.json" else {"well", "broken"}), told.stderr
    assert file in (told.stderr if broken == "config.json" else told.stdout)
    refused = gpt2("store", "gc", "--store", store, "--yes", cwd=tmp_path)
    assert refused.returncode == 2 and "nothing is deleted" in refused.stderr and f"{file} is no JSON" in refused.stderr
    traced = gpt2("lineage", "trace", "broken", "--step", "1", "--store", store, cwd=tmp_path)
    assert traced.returncode == 2 and f"{file} is no JSON" in traced.stderr
    for name, value in place.variables().items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.ephemeral() as dagster:
        dagster.add_dynamic_partitions("run", ["well", "broken"])
        context = dg.build_sensor_context(dagster, repository_def=definitions.defs.get_repository_def())
        assert sensors.new_checkpoints.evaluate_tick(context).run_requests == []


def states(store, tmp_path) -> dict[str, tuple[str, str]]:
    done = gpt2("store", "status", "tiny", "--store", str(store), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return {s["stage"]: (s["state"], s["reason"]) for s in json.loads(done.stdout)}


def test_status_says_what_would_be_made_anew_and_why(finished, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(finished.store, store)
    assert {state for state, _ in states(store, tmp_path).values()} == {"fresh"}

    config = objects.read_json(f"{store}/runs/tiny/config.json")
    config["train"]["lr"] /= 2
    objects.publish_json(f"{store}/runs/tiny/config.json", config)
    shutil.rmtree(store / "runs/tiny/report")
    found = states(store, tmp_path)
    assert found["token_shards"][0] == "fresh"
    assert found["trained_model"] == ("stale", "train.lr 0.005 → 0.0025")
    assert found["hf_model"][0] == "stale" and found["hf_model"][1].startswith("runs/tiny ")
    assert found["validation_loss"][0] == "stale" and found["validation_loss"][1].startswith("runs/tiny/export ")
    assert found["report"][0] == "missing"

    shutil.rmtree(store / "tokens")
    found = states(store, tmp_path)
    assert found["documents"][0] == "fresh" and found["token_shards"][0] == "missing"
    assert found["trained_model"] == ("stale", "it is made from token_shards, which is not there")
