"""The whole chain on S3: a real server on loopback, the same outputs as on a disk."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from tiny_pipeline import ROOT, TINY_SETTINGS, Finished, free_port, gpt2

from assets.corpus import documents_output
from assets.tokens import tokens_key
from assets.turns import turn
from storage import objects, records, sources
from training.recipes import recipe


@pytest.mark.slow
def test_a_run_whose_store_is_lost_has_failed_and_is_no_bad_input(s3_store: str, tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=(port := free_port()))  # another door to the same buckets
    server.start()
    command = [sys.executable, "-m", "pipeline.commands.main", "run", "--only", "data", "--store", s3_store]
    reached = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | reached
    demo = recipe("demo")
    _, corpus, _ = documents_output(sources.resolve(demo.corpus)).key.split("/")
    with turn(s3_store, tokens_key(demo, corpus), print):  # where the run waits until its store is lost
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 240
            while not objects.list_files(s3_store, "/inputs.json"):
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            server.stop()
            said = run.communicate(timeout=240)[1].strip().splitlines()
        finally:
            run.kill()
            run.wait()
    assert run.returncode == 1
    assert "S3 can't be read or written (Could not connect to the endpoint URL" in said[-1]
    assert said[-1].endswith("the same command goes on from there")


@pytest.mark.slow
def test_the_chain_runs_on_s3_and_is_reused_from_there(s3_store: str, finished: Finished, tmp_path: Path) -> None:
    arguments = ("run", "--name", "tiny", *TINY_SETTINGS, "--store", s3_store, "--json")
    done = gpt2(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = {output["key"]: output for output in json.loads(done.stdout)["outputs"]}
    local = {output["key"]: output for output in finished.answer["outputs"]}
    assert there.keys() == local.keys()
    for key, output in there.items():
        record, twin = records.read_record(s3_store, key), records.read_record(finished.store, key)
        assert record is not None and twin is not None
        assert record.fingerprint == twin.fingerprint
        assert all(records.file_problem(s3_store, key, file) is None for file in record.files)
        if key == "runs/tiny" or key.startswith("tokens/"):
            assert output["metrics"].get("loss") == local[key]["metrics"].get("loss")
    assert (
        objects.read_text(objects.join(s3_store, "runs/tiny/main.log"))
        == Path(finished.store, "runs/tiny/main.log").read_text()
    )

    other_machine = tmp_path / "other-machine"  # with nothing in its home
    other_machine.mkdir()
    again = gpt2(*arguments, cwd=other_machine)
    assert again.returncode == 0, again.stderr
    assert all(output["reused"] for output in json.loads(again.stdout)["outputs"])
    rescored = gpt2("evals", "tiny", "--suite", "completion_demo", "--store", s3_store, "--json", cwd=other_machine)
    assert rescored.returncode == 0, rescored.stderr
    assert [output["asset"] for output in json.loads(rescored.stdout)["outputs"]] == ["completion_demo", "report"]
