"""`gpt2 ui` in a test: started as a user does, asked over GraphQL as its page asks."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tiny_pipeline import ROOT, free_port

LAUNCH = """mutation($params: ExecutionParams!) {launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}
  ... on RunConfigValidationInvalid {errors {message}}}}"""
ADD = """mutation($key: String!) {addDynamicPartition(partitionsDefName: "run", partitionKey: $key,
  repositorySelector: {repositoryLocationName: "gpt2", repositoryName: "__repository__"}) {__typename}}"""
STATUS = "query($id: ID!) {runOrError(runId: $id) {... on Run {status}}}"
TERMINATE = """mutation($id: String!) {terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE) {__typename}}"""
RETRY = """mutation($params: ReexecutionParams!) {launchRunReexecution(reexecutionParams: $params) {
  __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}"""


@dataclass(frozen=True)
class Page:
    """A running `gpt2 ui`."""

    address: str
    process: subprocess.Popen[bytes]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        try:
            answer = json.loads(urllib.request.urlopen(request, timeout=240).read())
        except urllib.error.HTTPError as error:  # of our code; what it said is in the answer
            answer = json.loads(error.read())
        assert "errors" not in answer, answer
        return dict(answer["data"])

    def launch(self, job: str, run: str, assets: Sequence[str], config: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the launchpad's buttons send: they add the partition `run`, and launch the job for it."""
        self.ask(ADD, key=run)
        params = {
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": run}]},
            "runConfigData": json.dumps(config or {}),
            "selector": {
                "repositoryLocationName": "gpt2",
                "repositoryName": "__repository__",
                "jobName": job,
                "assetSelection": [{"path": [name]} for name in assets],
            },
        }
        return dict(self.ask(LAUNCH, params=params)["launchRun"])

    def status(self, run_id: str) -> str:
        return str(self.ask(STATUS, id=run_id)["runOrError"]["status"])


@contextmanager
def serve(store: str, **environment: str) -> Iterator[Page]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands.main", "ui", "--port", str(port), "--store", store],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    page = Page(f"http://127.0.0.1:{port}", process)
    try:
        wait_for("the page", lambda: process.poll() is not None or _answers(page))
        assert process.poll() is None, "gpt2 ui ended"
        yield page
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=240)


def _answers(page: Page) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{page.address}/server_info", timeout=5).read())
    except OSError:  # also a TimeoutError of one that is slow to answer
        return False


def wait_for(what: str, done: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
