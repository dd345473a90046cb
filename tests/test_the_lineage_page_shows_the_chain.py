"""`gpt2 ui` serves what the command line made: over GraphQL and as a person sees it, in a real browser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_pipeline import ROOT, Finished

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
ASSETS = {
    "documents": ("data", []),
    "token_shards": ("data", ["documents"]),
    "eval_items": ("data", ["token_shards"]),
    "trained_model": ("training", ["eval_items", "token_shards"]),
    "hf_model": ("training", ["trained_model"]),
    "validation_loss": ("evals", ["hf_model", "token_shards"]),
    "completion_demo": ("evals", ["eval_items", "hf_model"]),
    "eleuther": ("evals", ["eval_items", "hf_model"]),
    "hellaswag": ("evals", ["eval_items", "hf_model"]),
    "core": ("evals", ["hf_model"]),
    "inspection": ("checks", ["documents", "eval_items", "token_shards"]),
    "report": ("evals", ["completion_demo", "core", "eleuther", "hellaswag", "inspection", "validation_loss"]),
}
UNMADE = {"hellaswag", "core"}  # in a run whose configuration names no data for them
NODES = """{assetNodes {assetKey {path} groupName kinds description opVersion dependencyKeys {path}
  partitionKeys assetMaterializations(limit: 1) {runId partition}
  assetChecksOrError {... on AssetChecks {checks {name blocking executionForLatestMaterialization {status}}}}}}"""
STATUS = "query($id: ID!) {runOrError(runId: $id) {... on Run {status}}}"
LAUNCH = """mutation($params: ExecutionParams!) {launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}"""


@pytest.fixture(scope="module")
def ui(finished: Finished) -> Iterator[str]:
    """The address of a running `gpt2 ui`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands.main", "ui", "--port", str(port), "--store", finished.store],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, "gpt2 ui ended"
        try:
            urllib.request.urlopen(f"{address}/server_info", timeout=5).read()
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    yield address
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)


def ask(ui: str, query: str, **variables: Any) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{ui}/graphql", body, {"Content-Type": "application/json"})
    answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    assert "errors" not in answer, answer
    return dict(answer["data"])


def test_graphql_tells_the_chain_with_groups_checks_and_partitions(ui: str) -> None:
    nodes = {node["assetKey"]["path"][0]: node for node in ask(ui, NODES)["assetNodes"]}
    assert {
        name: (node["groupName"], sorted(key["path"][0] for key in node["dependencyKeys"]))
        for name, node in nodes.items()
    } == ASSETS
    for name, node in nodes.items():
        assert sorted(node["partitionKeys"]) == ["demo", "tiny"], name
        assert node["kinds"] and node["description"], name
        assert [m["partition"] for m in node["assetMaterializations"]] == ([] if name in UNMADE else ["tiny"])
        for check in node["assetChecksOrError"].get("checks", []):
            assert check["blocking"] == (name != "inspection")
            if name not in (*UNMADE, "inspection"):  # whose checks warn of what is in the demo's corpus
                assert check["executionForLatestMaterialization"]["status"] == "SUCCEEDED", (name, check)


def test_materialize_all_works_from_the_ui(ui: str) -> None:
    """What the page's button sends; the daemon executes it, and finds everything made already."""
    params = {
        "mode": "default",
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "tiny"}]},
        "runConfigData": "{}",
        "selector": {
            "repositoryLocationName": "gpt2",
            "repositoryName": "__repository__",
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": [name]} for name in ASSETS],
        },
    }
    launched = ask(ui, LAUNCH, params=params)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run = launched["run"]["runId"]
    status = "QUEUED"
    for _ in range(240):
        status = ask(ui, "query($id: ID!) {runOrError(runId: $id) {... on Run {status}}}", id=run)["runOrError"][
            "status"
        ]
        if status in ("SUCCESS", "FAILURE", "CANCELED"):
            break
        time.sleep(0.5)
    assert status == "SUCCESS"
    latest = {n["assetKey"]["path"][0]: n["assetMaterializations"] for n in ask(ui, NODES)["assetNodes"]}
    assert {name for name, made in latest.items() if made and made[0]["runId"] == run} == set(ASSETS) - UNMADE


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_draws_every_asset_of_the_graph(ui: str) -> None:
    from playwright.sync_api import sync_playwright

    groups = "%2C".join(f"global%40global%3A{group}" for group in ("data", "training", "evals", "checks"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.goto(f"{ui}/asset-groups?expanded={groups}")
        page.wait_for_selector("text=trained_model", timeout=60_000)
        for name in ASSETS:
            assert page.locator(f'foreignObject:has-text("{name}")').count(), f"{name} is not drawn"
        browser.close()
