"""A model folder, or a hub's model, goes through the same evals as a run; its scores are kept, reused and compared."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gpt2
import tiny_run
from local_model_hub import ModelHub, serve
from test_core_centres_its_tasks import write_bundle
from tiny_pipeline import Finished, gpt2

from assets.asked import Asked, asked
from assets.baselines import asked_the_same
from assets.making import Produced, StageConfig
from assets.models import scored_here
from assets.scores import ALL_SCORED, produced, score_output
from evals import core, reference, results
from evals.results import EvalResult, Score
from pipeline.commands import evals
from pipeline.runs import silent_maker
from storage import models, objects, records
from storage.contents import FOLDERS
from storage.integrity import verify
from storage.lineage import Lineage
from storage.places import places
from training import recipes
from training.config import EvalConfig


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    with serve(monkeypatch, tmp_path / "cache") as made:
        yield made


def test_a_folder_is_scored_kept_and_reused(finished: Finished, tmp_path: Path) -> None:
    folder, store = tiny_gpt2.save(tmp_path / "gpt2-mini"), str(tmp_path / "store")
    shutil.copytree(finished.store, store)
    arguments = ("evals", folder, "--like", "tiny", "--suite", "validation_loss", "--store", store, "--json")
    done = gpt2(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["models"]
    (output,) = answer["outputs"]
    score = records.read_record(store, output["key"])
    ours = records.read_record(store, "runs/tiny/scores/validation_loss")
    assert score is not None and ours is not None
    assert score.rows == ours.rows  # the same windows, though this model's context is longer
    model, tokens = (records.read_record(store, parent.key) for parent in score.parents)
    assert model is not None and tokens is not None
    assert model.asset == "model" and {Path(f.path).name for f in model.files} >= {"model.safetensors", "config.json"}
    assert tokens.fingerprint in {parent.fingerprint for parent in ours.parents}

    again = gpt2(*arguments, cwd=tmp_path)
    assert json.loads(again.stdout)["models"][0]["outputs"][0]["reused"]

    compared = gpt2("compare", "tiny", "gpt2-mini", "--store", store, "--json", cwd=tmp_path)
    rows = {row["score"]: row for row in json.loads(compared.stdout)["scores"]}
    assert rows["loss"]["same_items"] and rows["loss"]["against"] == "gpt2-mini"
    assert rows["loss"]["difference"] == pytest.approx(
        ours.metrics["scores"]["loss"]["value"] - score.metrics["scores"]["loss"]["value"]
    )


def test_a_model_keeps_its_answers_to_each_set_of_questions(tmp_path: Path) -> None:
    maker = silent_maker(places(str(tmp_path / "store")))
    store = maker.places.store
    model, *shards = (given(store, key) for key in ("models/mini-0123abcd", "tokens/a", "tokens/b"))
    several = [Asked("validation_loss", list, [tokens], definition={"window": 64}) for tokens in shards]
    several += [Asked("eleuther", list, definition={"tasks": tasks}) for tasks in ("piqa", "arc_easy")]
    outputs = [score_output(questions, model.key, model, "fp32") for questions in several]
    for number, output in enumerate(outputs):
        file = f"{objects.name_of(output.key)}.json"
        objects.publish_json(f"{maker.folder(output.key)}/{file}", {"number": number})
        found = Produced([file], metrics={"scores": {"acc": {"value": float(number), "n": 1}}})
        maker.make(StageConfig(), output, lambda _, found=found: found)
    assert all(output.reusable(store)[0] for output in outputs)
    assert [objects.read_json(records.output_url(store, o.key))["number"] for o in outputs] == [0, 1, 2, 3]
    assert len(scored_here(store)["mini-0123abcd"]) == 4
    rows = Lineage(maker.places.lineage).sql("SELECT suite, value, model FROM scores ORDER BY value")[1]
    assert rows == [(o.asset, float(n), "mini") for n, o in enumerate(outputs)]
    assert not verify(store, FOLDERS).problems


def test_fewer_items_are_other_questions_and_windows_of_one_length_are_the_same(tmp_path: Path) -> None:
    maker, run = silent_maker(places(str(tmp_path))), tiny_run.config()
    maker.define("tiny", run)
    model, items = given(str(tmp_path), "models/mini-0123abcd"), given(str(tmp_path), "eval_items/c")

    def scored(place: str, suite: str, count: int | None, **definition: int) -> records.Record:
        questions = Asked(suite, list, [items], count, definition)
        output = score_output(questions, place, model, "fp32")
        return maker.make(StageConfig(), output, lambda _: Produced())[0].record

    ours = [scored("runs/tiny", suite, 8) for suite in ("validation_loss", "completion_demo", "eleuther")]
    scored(model.key, "validation_loss", None, window=run.model.context)
    scored(model.key, "completion_demo", 8)
    scored(model.key, "eleuther", 4)
    (other,) = asked_the_same(maker, "tiny", ours)
    assert {score.asset for score in other.scores} == {"validation_loss", "completion_demo"}
    older = [replace(score, code_version="0") for score in ours]
    assert asked_the_same(maker, "tiny", older) == []


def test_tasks_of_another_lm_eval_are_other_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = silent_maker(places(str(tmp_path)))
    model = given(str(tmp_path), "models/mini-0123abcd")

    def wanted(tasks: str) -> str:
        questions = asked(maker, "eleuther", EvalConfig(harness=tasks))
        assert isinstance(questions, Asked)
        return score_output(questions, model.key, model, "fp32").fingerprint

    before = [wanted(tasks) for tasks in ("leaderboard-v1", "piqa")]
    assert before == [wanted(tasks) for tasks in ("leaderboard-v1", "piqa")]
    newer = records.library_versions() | {"lm_eval": "99.0"}
    monkeypatch.setattr(records, "library_versions", lambda: newer)
    assert not {*before} & {wanted(tasks) for tasks in ("leaderboard-v1", "piqa")}


@pytest.mark.parametrize("wanted, whole", [(3, True), (4, False), (None, False)])
def test_a_score_of_fewer_items_than_there_were_is_kept_by_nobody(
    wanted: int | None, whole: bool, tmp_path: Path
) -> None:
    """Where only the suite knows how many there are, as of named tasks and of CORE."""
    maker = silent_maker(places(str(tmp_path)))
    model, questions = given(str(tmp_path), "models/mini-0123abcd"), Asked("core", list)
    output = score_output(questions, model.key, model, "fp32")
    out = records.output_url(str(tmp_path), output.key)
    scored = EvalResult("core", "a protocol", {}, {"core": Score(0.2, None, 3)}, 3, 0, [{"item": 1}], {}, wanted)
    results.publish(scored, out, 1.0)
    _, (check,) = maker.make(StageConfig(), output, lambda _: produced(out, questions, 0.0), [ALL_SCORED])
    assert check.passed == whole == bool(records.read_record(str(tmp_path), output.key))


def given(store: str, key: str) -> records.Record:
    """The record of an output without files."""
    mark, when = records.fingerprint("given", "1", {"key": key}, []), "2026-11-24T10:00:00"
    record = records.Record("given", key, mark, "1", {"key": key}, [], [], when, when, metrics={"name": "mini"})
    records.write_record(store, record)
    return record


def test_a_model_on_the_hub_is_one_at_a_commit(hub: ModelHub, tmp_path: Path) -> None:
    """By the real client."""
    hub.publish("owner/gpt2-tiny", Path(tiny_gpt2.save(tmp_path / "model")))
    hub.repos["owner/gpt2-tiny"] |= {"flax_model.msgpack": b"another program's weights"}
    model = models.resolve("owner/gpt2-tiny")
    assert model.identity == {"repo": "owner/gpt2-tiny", "commit": hub.commit_of("owner/gpt2-tiny")}
    assert model.name == "gpt2-tiny"
    folder = Path(models.fetch(model))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    assert not (folder / "flax_model.msgpack").exists()
    with pytest.raises(ValueError, match="no run, model folder or hub model 'owner/gpt2-tinny'"):
        models.resolve("owner/gpt2-tinny")


def test_without_a_network_what_was_fetched_before_serves(
    hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("owner/gpt2-tiny", Path(tiny_gpt2.save(tmp_path / "model")))
    online = models.resolve("owner/gpt2-tiny")
    folder = models.fetch(online)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = models.resolve("owner/gpt2-tiny")
    assert (offline.identity, models.fetch(offline)) == (online.identity, folder)
    with pytest.raises(ValueError, match="gpt2 is neither a run nor a folder here, and the hub .* can't be reached"):
        models.resolve("gpt2")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gpt2"], "can't be reached (HF_HUB_OFFLINE is set): give a local model folder"),
        (["./absent"], "absent does not exist: give a run, a Hugging Face model folder, or a hub name"),
        (["gpt2", "--suite", "validation_loss"], "name that run with --like RUN"),
        (["gpt2", "--suite", "helaswag"], "--suite helaswag is unknown"),
        (["gpt2", "--set", "hellaswag=absent.jsonl"], "absent.jsonl: there is no such file; places with a name are"),
        (["gpt2", "--set", "dtyp=bf16"], "write one of completion_items=…"),
        (["bert-base", "--against", "published"], "no numbers of bert-base were published"),
        (
            ["gpt2", "--against", "published", "--suite", "eleuther", "--set", "harness=piqa"],
            "no numbers of gpt2 in eleuther were published that could come out here: --against published knows "
            "hellaswag, core of the released GPT-2",
        ),
        (["gpt3-125m", "--against", "published"], "no numbers of gpt3-125m in hellaswag were published"),
        (["gpt2", "--against", "gpt2-xl"], "only `published` is known"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = gpt2("evals", *arguments, "--store", str(tmp_path / "store"), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("place", ["published", "hub", "datasets:Rowan/hellaswag"])
def test_a_place_of_items_may_have_a_name(place: str, tmp_path: Path) -> None:
    settings = {"hellaswag": place}
    evals.check(places(str(tmp_path)), [tiny_gpt2.save(tmp_path / "m")], ["hellaswag"], "", settings, "")


def test_items_come_from_where_the_recipes_have_them(tmp_path: Path) -> None:
    settings = evals._defaults(places(str(tmp_path)), "", {}, ["hellaswag"])
    assert settings["hellaswag"] == recipes.recipe("gpt2-124m").evals.hellaswag


def hellaswag(**values: float) -> dict[str, dict]:
    return {"hellaswag": {"scores": {name: {"value": v, "stderr": 0.0046} for name, v in values.items()}}}


def test_published_numbers_come_out_or_do_not() -> None:
    """Of GPT-2 124M; the line of llm.c's plots is its completion protocol, normalised by tokens."""
    rows = reference.against_published(hellaswag(completion_acc_norm=0.2950, harness_acc=0.2990), "gpt2")
    assert [(c.score, c.reference, reference.reproduces(c)) for c in rows] == [
        ("completion_acc_norm", 0.2955, True),
        ("completion_acc_norm", 0.294463, True),
        ("harness_acc", 0.2892, False),
    ]
    (row,) = reference.against_published(hellaswag(completion_acc_norm=0.3752), "gpt2-medium")
    assert row.source == "llm.c, dev/vislog.ipynb" and reference.reproduces(row)
    assert reference.published_name("openai-community/gpt2-xl") == "gpt2-xl"


def whole_core(folder: Path) -> str:
    """A bundle of as many tasks as CORE has."""
    write_bundle(folder)
    task = "dataset_uri: a/sums.jsonl, num_fewshot: [1], icl_task_type: multiple_choice"
    lines = [f"- {{label: task {n}, {task}}}" for n in range(core.TASKS)]
    (folder / "core.yaml").write_text("\n".join(["icl_tasks:", *lines]))
    chances = [f"task {n},math,33.0" for n in range(core.TASKS)]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Task Category,Random baseline", *chances]))
    return str(folder)


@pytest.mark.slow
def test_the_command_holds_a_hub_model_against_its_published_numbers(
    hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This hub's GPT-2 is a random one, so that its numbers do not come out."""
    hub.publish("openai-community/gpt2", Path(tiny_gpt2.save(tmp_path / "model")))
    for name, value in {"OFFLINE": "0", "CACHE": str(tmp_path / "cache"), "DISABLE_XET": "1"}.items():
        monkeypatch.setenv(f"HF_HUB_{name}", value)
    asked = ["--against", "published", "--suite", "core", "--set", f"core={whole_core(tmp_path / 'bundle')}"]
    command = ["evals", "openai-community/gpt2", *asked, "--store", str(tmp_path / "store")]
    done = gpt2(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["models"]
    (row,) = answer["published"]
    assert (row["score"], row["reference"], row["source"]) == ("core", 0.1139, "nanochat")
    assert row["errors"] == pytest.approx((row["value"] - 0.1139) / row["stderr"])
    assert answer["reproduced"] == row["reproduced"] == (abs(row["errors"]) <= 1)
