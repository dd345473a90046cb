"""Bad input ends at once with status 2 and one line that names the value and the fix; nothing is left behind."""

import json
import math
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from moto.core import set_initial_no_auth_action_count
from tiny_pipeline import ROOT, TINY_SETTINGS, Finished, copied, gpt2

from assets.run_config import check_unchanged, config_url
from pipeline import definitions, launchpad, runs
from storage import objects, records
from storage.places import places
from training.config import to_dict
from training.gpus import check_gpus
from training.recipes import recipe


def refuse(*arguments: str, cwd: Path, store: Path | str) -> str:
    """The one line that a refused command says; the store must be as it was."""
    done = gpt2(*arguments, "--store", str(store), cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert not os.path.exists(store), f"{store} was made for a command that was refused"
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2_124m"], "unknown recipe 'gpt2_124m': did you mean gpt2-124m"),
        (["demo", "--set", "stps=3"], "unknown key 'stps' (did you mean steps?)"),
        (["demo", "--set", "steps=many"], "steps='many' is not a whole number"),
        (["demo", "--set", "lr=1e999"], "lr=inf is not a finite number"),
        (["demo", "--set", "schedule=cosin"], "schedule='cosin' is none of cosine, linear, constant, wsd"),
        (["demo", "--set", "steps"], "write key=value"),
        (["demo", "--set", "batch_tokens=1000"], "the nearest that are 768 and 1024"),
        (["demo", "--set", "evals.hellaswag=absent.jsonl"], "absent.jsonl: there is no such file"),
        (["demo", "--corpus", "embeded"], "no corpus 'embeded': did you mean embedded?"),
        (["demo", "--corpus", "absent/folder"], "no corpus 'absent/folder'"),
        (["demo", "--name", "a/b"], "run name 'a/b' is not a good name"),
        (["demo", "--name", "a" * 201], "has 201 letters: 200 are enough"),
        (["demo", "--only", "eval"], "--only eval: did you mean evals"),
        (["demo", "--set", "shard_ranks=3"], "shard_ranks=3 does not divide the 1 ranks"),
        (["demo", "--set", "vocab=1000"], "vocab=1000 is less than the shards' vocabulary, GPT-2's 50257"),
        (["modern:d1c128", "--set", "heads=128"], "heads=128 leaves 1 of 128 channels to a head"),
        (["demo", "--set", "timeout=0"], "timeout=0.0 must be above 0"),
        (["demo", "--gpus", "3"], "the nearest that do are 768 or 1536"),
    ],
)
def test_a_value_that_is_not_known(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in refuse("run", *arguments, cwd=tmp_path, store=tmp_path / "store")


TWO_H100 = """#!/bin/sh
case "$*" in
-L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"; echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)" ;;
*) echo "NVIDIA H100 80GB HBM3, 81559"; echo "NVIDIA H100 80GB HBM3, 81559" ;;
esac
"""


@pytest.fixture
def two_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists them, on a machine whose torch has no CUDA."""
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPUs of this machine")
    (tmp_path / "driver").mkdir()
    program = tmp_path / "driver/nvidia-smi"
    program.write_text(TWO_H100)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


UNUSABLE = f"torch {torch.__version__} can't use this machine's GPUs (2 of them): "


@pytest.mark.usefixtures("two_h100")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], UNUSABLE),
        (["--gpus", "2"], UNUSABLE),
        (["--gpus", "4"], "gpus=4 is more than this machine has: choose 2 or fewer"),
    ],
)
def test_gpus_that_are_not_there_or_that_torch_cannot_use(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in refuse("run", "demo", *arguments, cwd=tmp_path, store=tmp_path / "store")


@pytest.mark.usefixtures("two_h100")
def test_ranks_do_not_take_the_cpu_for_gpus_unless_these_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(steps=1))
    command = [sys.executable, "-m", "training.train", run, "--tokens", tiny_run.tokens(tmp_path / "tokens")]
    wanted = {"cwd": tiny_run.ROOT, "capture_output": True, "text": True, "timeout": 300}
    refused = subprocess.run(command, **wanted)  # type: ignore[call-overload]
    assert refused.returncode == 2 and UNUSABLE in refused.stderr
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus(4)
    assert runs.cpu_ranks(recipe("demo", ["gpus=4"])) == "no GPU here: training takes 4 CPU ranks"
    assert subprocess.run(command, **wanted).returncode == 0  # type: ignore[call-overload]


@pytest.mark.usefixtures("two_h100")
def test_scores_do_not_take_the_cpu_for_gpus(finished: Finished, tmp_path: Path) -> None:
    store = copied(finished.store, tmp_path)
    score = "runs/tiny/scores/validation_loss"
    before = records.read_record(store, score)
    done = gpt2("evals", "tiny", "--suite", "validation_loss", "--store", store, cwd=tmp_path)
    assert done.returncode == 2 and f"torch {torch.__version__} sees no GPU" in done.stderr, done.stderr
    assert before is not None and records.read_record(store, score) == before


@pytest.mark.parametrize(
    "setting", ["beta1=1.5", "beta2=1", "weight_decay=-3", "final_lr_fraction=-1", "eps=-1", "skip_grad_z=-1"]
)
def test_a_number_that_no_training_can_have(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}=.* must"):
        recipe("demo", [setting])


def test_a_folder_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    said = refuse("run", "--corpus", "texts", cwd=tmp_path, store=tmp_path / "store")
    assert "texts holds no .parquet file" in said


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"content": ["hello"], "id": ["1"]}), tmp_path / "texts/a.parquet")
    said = refuse("run", "--corpus", "texts", cwd=tmp_path, store=tmp_path / "store")
    assert "texts/a.parquet" in said
    assert "content" in said and "text" in said


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.parquet").write_bytes(b"PAR1 but then something else")
    said = refuse("run", "--corpus", "texts", cwd=tmp_path, store=tmp_path / "store")
    assert "texts/a.parquet" in said


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refuse("run", cwd=tmp_path, store=tmp_path / "file" / "store")
    assert "file/store can't be written" in said and "--store" in said


@pytest.mark.parametrize("command", ["lineage rebuild", "evals tiny"])
def test_a_home_where_this_user_may_not_write(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a store that somebody else has made."""
    monkeypatch.setenv("GPT2_HOME", "/sys/gpt2")
    objects.publish_json(config_url(places(str(tmp_path / "store")), "tiny"), to_dict(recipe("demo")))
    for made in ("inputs.json", "record.json", "export/record.json"):
        objects.publish_json(str(tmp_path / "store/runs/tiny" / made), {})
    done = gpt2(*command.split(), "--store", str(tmp_path / "store"), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("gpt2: /sys/gpt2") and "can't be read or written" in said and "GPT2_HOME" in said


@pytest.mark.parametrize("answer", ["lineage show tiny", "lineage trace tiny --step 1 --text", "compare tiny tiny", ""])
def test_an_answer_reaches_a_terminal_without_unicode(
    answer: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(finished.store, tmp_path)
    for name, value in {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    words = answer.split() or ["run", "--name", "tiny", *TINY_SETTINGS]
    done = gpt2(*words, "--store", store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "?" in done.stdout


def test_a_bucket_that_is_not_there(s3_store: str, tmp_path: Path) -> None:
    said = refuse("run", cwd=tmp_path, store="s3://no-such-bucket-anywhere/store")
    assert "s3://no-such-bucket-anywhere/store can't be written" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--store", "s3://"),  # of an empty $BUCKET
        ("env", "--store", "s3:/bucket/store"),
        ("run", "--corpus", "s3:/bucket/texts"),
        ("run", "--set", "evals.hellaswag=s3:/bucket/items.jsonl"),
        ("run", "--set", "evals.core=s3:/bucket/core"),
        ("report", "demo", "--out", "s3:/bucket/report"),
    ],
)
def test_an_address_on_s3_that_names_no_bucket(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = gpt2(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpt2: {arguments[-1].split('=')[-1]} is no place on S3")
    assert len(done.stderr.splitlines()) == 1 and os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["training.train", "training.export", "evals.run"])
def test_the_training_program_takes_no_address_without_a_bucket(module: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(recipe("demo"))))
    arguments = {
        "training.train": ["run", "--tokens", "tokens", "--mirror", "s3:/bucket/run"],
        "training.export": ["run", "--tokens", "tokens", "--out", "s3:/bucket/export"],
        "evals.run": ["run", "--suite", "hellaswag", "--items", "run", "--out", "s3:/bucket/scores.json"],
    }[module]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "is no place on S3" in done.stderr and os.listdir(tmp_path) == ["run"]


def test_a_store_is_the_same_by_whichever_way_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert places("../store") == places(str(tmp_path / "store/")) == places("../here/../store/.")
    assert places("x", {"GPT2_HOME": "../home"}).home == tmp_path / "home"


@pytest.mark.parametrize("question", ["show demo", "cost demo", "impact x", "sql SELECT(1)"])
def test_a_question_of_a_store_that_is_not_there(question: str, tmp_path: Path) -> None:
    assert "there is nothing in" in refuse("lineage", *question.split(), cwd=tmp_path, store=tmp_path / "store")


def test_a_port_that_cannot_be_had(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = gpt2("ui", "--port", str(port), "--store", str(tmp_path / "store"), cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"gpt2: port {port} can't be had"), done.stderr
    none = gpt2("ui", "--port", "99999", "--store", str(tmp_path / "store"), cwd=tmp_path, timeout=60)
    assert none.returncode == 2 and "Invalid value for '--port'" in none.stderr, none.stderr


def test_a_page_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refuse("report", "demo", "--out", "file", cwd=tmp_path, store=tmp_path / "store")
    assert "--out file is a file: name the folder for the page" in said


def test_a_home_that_is_not_local() -> None:
    with pytest.raises(ValueError, match="GPT2_HOME=s3://bucket/home is not local"):
        places("store", {"GPT2_HOME": "s3://bucket/home"})


@pytest.mark.parametrize("command", ["run", "store status", "lineage show x", "evals x"])
def test_a_store_on_s3_without_keys(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # a cloud's machine may have keys
    monkeypatch.setenv("HOME", str(tmp_path))  # and its user, too
    said = refuse(*command.split(), cwd=tmp_path, store="s3://bucket/store")
    assert "can't be read or written (Unable to locate credentials): check " in said and "AWS_ACCESS_KEY_ID" in said


def test_a_server_that_is_not_there(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as closed:  # bound, but nothing listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        said = refuse("store", "status", cwd=tmp_path, store=s3_store)
    assert "Could not connect to the endpoint URL" in said and "AWS_ENDPOINT_URL" in said


@pytest.mark.parametrize("command", ["run", "store status"])  # which ask for an object, and for a listing
def test_keys_that_the_server_does_not_know(command: str, s3_store: str, tmp_path: Path) -> None:
    said = set_initial_no_auth_action_count(0)(refuse)(*command.split(), cwd=tmp_path, store=s3_store)
    assert "S3 can't be read or written (" in said and "AWS_SECRET_ACCESS_KEY" in said


def test_a_question_about_a_bucket_that_is_not_there(s3_store: str, tmp_path: Path) -> None:
    said = refuse("store", "status", cwd=tmp_path, store="s3://no-such-bucket-anywhere/store")
    assert "S3 can't be read or written (The specified bucket does not exist): check the bucket's name" in said


def test_a_disk_without_space(tmp_path: Path) -> None:
    settings = ["--set", "layers=4096", "--set", "channels=16384", "--set", "heads=128"]
    said = refuse("run", *settings, cwd=tmp_path, store=tmp_path / "store")
    assert "GiB free, this run needs about" in said


def test_a_run_of_another_definition_keeps_its_name(finished: Finished, tmp_path: Path) -> None:
    done = gpt2("run", "--name", "tiny", *TINY_SETTINGS, "--set", "lr=0.1", "--store", finished.store, cwd=tmp_path)
    assert done.returncode == 2
    assert "run 'tiny' exists with train.lr=0.005 (now 0.1): give the new one another name" in done.stderr
    assert "or go on with it: --name tiny --set train.lr=0.005" in done.stderr


def test_a_run_that_exists_is_gone_on_with_by_the_settings_that_its_refusal_names(tmp_path: Path) -> None:
    there = places(str(tmp_path / "store"))
    url = config_url(there, "first")
    objects.publish_json(url, to_dict(recipe("demo", ["steps=6", "lr=0.1", "shuffle=false", "core=a folder"])))
    with pytest.raises(ValueError) as refused:
        check_unchanged(there, "first", recipe("demo"))
    words = shlex.split(str(refused.value).partition("go on with it: ")[2])
    assert words[:2] == ["--name", "first"] and words[2::2] == ["--set"] * 4
    check_unchanged(there, "first", recipe("demo", words[3::2]))


def test_evals_of_a_run_that_is_not_there(finished: Finished, tmp_path: Path) -> None:
    done = gpt2("evals", "tinny", "--store", finished.store, cwd=tmp_path)
    assert done.returncode == 2
    assert "tinny is neither a run" in done.stderr and "the runs there are tiny" in done.stderr


@pytest.mark.parametrize("stage", ["training", "trained_model", "report", "evals"])
def test_evals_make_scores_and_nothing_else(stage: str, tmp_path: Path) -> None:
    objects.publish_json(config_url(places(str(tmp_path / "store")), "first"), to_dict(recipe("demo")))
    done = gpt2("evals", "first", "--suite", stage, "--store", str(tmp_path / "store"), cwd=tmp_path)
    assert done.returncode == 2 and f"gpt2: --suite {stage} is unknown: choose from" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("command", "gone", "made"),
    [
        ("evals tiny --suite completion_demo", "runs/tiny/export/model.safetensors", "hf_model"),
        ("evals tiny --suite validation_loss", "tokens/*/*_val_000000.bin", "token_shards"),
    ],
)
def test_a_file_that_somebody_has_deleted_is_named_and_made_anew(
    command: str, gone: str, made: str, finished: Finished, tmp_path: Path
) -> None:
    store = copied(finished.store, tmp_path)
    (file,) = Path(store).glob(gone)
    file.unlink()
    done = gpt2(*command.split(), "--store", store, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"gpt2: {made} is not whole, {file} is missing: `gpt2 run` makes it anew\n"
    again = gpt2("run", "--name", "tiny", *TINY_SETTINGS, "--only", made, "--store", store, cwd=tmp_path)
    assert again.returncode == 0 and file.exists(), again.stderr


def test_a_broken_shard_is_named_by_the_trainer(finished: Finished, tmp_path: Path) -> None:
    """Also where somebody trains by hand, without a pipeline that would make the shard anew."""
    source = next(Path(finished.store, "tokens").iterdir())
    (tmp_path / "tokens").mkdir()
    for path in source.glob("*.bin"):
        data = path.read_bytes()
        (tmp_path / "tokens" / path.name).write_bytes(b"junk" + data[4:] if "train_000001" in path.name else data)
    (tmp_path / "run").mkdir()
    config = Path(finished.store, "runs/tiny/config.json").read_text()
    (tmp_path / "run/config.json").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "training.launch", "--gpus", "1", "training.train"]
        + [str(tmp_path / "run"), "--tokens", str(tmp_path / "tokens")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "train_000001.bin" in done.stderr


@pytest.mark.parametrize(
    ("name", "train", "error", "said"),
    [
        ("team/alice", {}, ValueError, "run name 'team/alice' is not a good name for a folder"),
        ("../../outside", {}, ValueError, "run name '../../outside' is not a good name for a folder"),
        ("alice", {"lr": math.nan}, launchpad.Refused, "train.lr='nan' is not a number"),
    ],
)
def test_bad_input_from_the_launchpad(
    name: str,
    train: dict[str, float],
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in places(str(tmp_path / "home/store")).variables().items():
        monkeypatch.setenv(variable, value)
    config = {"resources": {"new_run": {"config": {"recipe": "demo", "train": train}}}}
    with dg.DagsterInstance.local_temp(str(tmp_path)) as dagster:
        dagster.add_dynamic_partitions("run", [name])
        job = definitions.build().resolve_job_def("demo")
        wanted = {"instance": dagster, "partition_key": name, "asset_selection": [dg.AssetKey("documents")]}
        with pytest.raises(error, match=said):
            job.execute_in_process(config, **wanted)
    assert not (tmp_path / "home/outside").exists() and not (tmp_path / "home/store/runs").exists()
