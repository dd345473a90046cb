"""`gpt2 ui` serves what the command line made: over GraphQL and as a person sees it, in a real browser."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tiny_pipeline import Finished
from tiny_ui import Page, serve, wait_for

from pipeline import launchpad
from training import recipes

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
ASSETS = {
    "documents": ("data", []),
    "token_shards": ("data", ["documents"]),
    "eval_items": ("data", ["token_shards"]),
    "inspection": ("checks", ["documents", "eval_items", "token_shards"]),
    "trained_model": ("training", ["eval_items", "token_shards"]),
    "hf_model": ("training", ["trained_model"]),
    "samples": ("training", ["trained_model"]),
    "validation_loss": ("evals", ["hf_model", "token_shards"]),
    "completion_demo": ("evals", ["eval_items", "hf_model"]),
    "eleuther": ("evals", ["eval_items", "hf_model"]),
    "hellaswag": ("evals", ["eval_items", "hf_model"]),
    "core": ("evals", ["hf_model"]),
    "report": (
        "evals",
        ["completion_demo", "core", "eleuther", "hellaswag", "inspection", "samples", "validation_loss"],
    ),
}
UNMADE = {"hellaswag", "core"}  # in a run whose configuration names no data for them
NODES = """{assetNodes {assetKey {path} groupName kinds description opVersion dependencyKeys {path}
  partitionKeys assetMaterializations(limit: 1) {runId partition}
  assetChecksOrError {... on AssetChecks {checks {name blocking executionForLatestMaterialization {status}}}}}}"""


JOBS = """{repositoryOrError(repositorySelector: {repositoryLocationName: "gpt2", repositoryName: "__repository__"}) {
  ... on Repository {jobs {name}}}}"""
FILLED = """query($job: String!, $run: String!) {pipelineOrError(params: {pipelineName: $job,
  repositoryLocationName: "gpt2", repositoryName: "__repository__"}) {... on Pipeline {
  partition(partitionName: $run) {runConfigOrError {... on PartitionRunConfig {yaml}}}}}}"""


@pytest.fixture(scope="module")
def ui(finished: Finished) -> Iterator[Page]:
    with serve(finished.store) as page:
        yield page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield opened
        opened.close()


def test_graphql_tells_the_chain_with_groups_checks_and_partitions(ui: Page) -> None:
    nodes = {node["assetKey"]["path"][0]: node for node in ui.ask(NODES)["assetNodes"]}
    assert {
        name: (node["groupName"], sorted(key["path"][0] for key in node["dependencyKeys"]))
        for name, node in nodes.items()
    } == ASSETS
    for name, node in nodes.items():
        assert {"demo", "tiny"} <= {*node["partitionKeys"]}, name
        assert node["kinds"] and node["description"] and node["opVersion"], name
        assert [m["partition"] for m in node["assetMaterializations"]] == ([] if name in UNMADE else ["tiny"])
        for check in node["assetChecksOrError"].get("checks", []):
            assert check["blocking"] == (name != "inspection")
            if check["blocking"] and name not in UNMADE:
                assert check["executionForLatestMaterialization"]["status"] == "SUCCEEDED", (name, check)


def test_materialize_all_works_from_the_ui(ui: Page) -> None:
    """What the page's button sends; the daemon executes it, and finds everything made already."""
    run = ui.launch("__ASSET_JOB", "tiny", list(ASSETS))["run"]["runId"]
    wait_for("the run", lambda: ui.status(run) in ("SUCCESS", "FAILURE", "CANCELED"))
    assert ui.status(run) == "SUCCESS"
    latest = {n["assetKey"]["path"][0]: n["assetMaterializations"] for n in ui.ask(NODES)["assetNodes"]}
    assert {name for name, made in latest.items() if made and made[0]["runId"] == run} == set(ASSETS) - UNMADE


def test_the_launchpad_has_a_job_for_each_recipe_filled_in_with_its_settings(ui: Page) -> None:
    jobs = {job["name"] for job in ui.ask(JOBS)["repositoryOrError"]["jobs"]}
    assert {launchpad.job_name(name) for name in recipes.RECIPES} < jobs
    filled = ui.ask(FILLED, job="gpt2_1558m", run="tiny")["pipelineOrError"]["partition"]["runConfigOrError"]["yaml"]
    settings = yaml.safe_load(filled)["resources"]["new_run"]["config"]
    assert (settings["recipe"], settings["corpus"]) == ("gpt2-1558m", "fineweb-edu-100B")
    assert (settings["model"]["layers"], settings["train"]["batch_tokens"]) == (48, 1_048_576)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recipe": "gpt2-1559m"}, "gpt2-1559m"),
        ({"recipe": "demo", "corpus": "embeded"}, "not in enum type Corpus got embeded"),
        ({"recipe": "demo", "train": {"stps": 3}}, 'unexpected config entry "stps"'),
        ({"recipe": "demo", "train": {"steps": "many"}}, 'Value "many"'),
        ({"recipe": "demo", "train": {"batch_tokens": 1000}}, "the nearest that are 768 and 1024"),
        ({"recipe": "demo", "evals": {"hellaswag": "absent.jsonl"}}, "absent.jsonl: there is no such file"),
        ({"recipe": "demo", "corpus": "elsewhere"}, "corpus_at goes with corpus: elsewhere"),
        ({"train": {"steps": 3}}, "needs its recipe"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_before_launch(ui: Page, settings: dict[str, Any], said: str) -> None:
    answer = ui.launch("demo", "tiny", list(ASSETS), {"resources": {"new_run": {"config": settings}}})
    assert said in json.dumps(answer).replace('\\"', '"'), answer
    assert answer["__typename"] in ("PythonError", "RunConfigValidationInvalid")


def opened(browser: Any, address: str) -> Any:
    """A page that is waited for as long as a slow machine may take."""
    page = browser.new_page(viewport={"width": 1800, "height": 1000})
    page.set_default_timeout(240_000)
    page.goto(address)
    return page


def test_a_browser_draws_every_asset_of_the_graph(ui: Page, browser: Any) -> None:
    groups = "%2C".join(f"global%40global%3A{group}" for group in ("data", "checks", "training", "evals"))
    page = opened(browser, f"{ui.address}/asset-groups?expanded={groups}")
    for name in ASSETS:
        page.locator(f'foreignObject:has-text("{name}")').first.wait_for(state="attached")
    page.close()


def test_a_browser_launches_nothing_until_the_settings_are_good(ui: Page, browser: Any) -> None:
    """The launchpad of a recipe's job: a new run is named, the recipe is filled in, its page has no complaint."""
    from playwright.sync_api import expect

    page = opened(browser, f"{ui.address}/locations/gpt2/jobs/gpt2_124m")
    page.locator("button", has=page.locator("[aria-label=arrow_drop_down]")).last.click()
    page.get_by_text("Open launchpad").first.click()
    launch = page.get_by_role("button", name="Materialize").last
    page.get_by_text("Add new partition").click()
    page.get_by_placeholder("name", exact=True).fill("of-the-browser")
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_selector("text=No errors")
    page.wait_for_selector("text=partition: of-the-browser")
    expect(launch).to_be_enabled(timeout=240_000)
    page.locator(".CodeMirror", has_text="recompute").first.click()
    page.keyboard.press("Control+End")
    page.keyboard.insert_text("\nresourcez: {}\n")
    page.wait_for_selector('text=/unexpected config entry "resourcez"/')
    expect(launch).to_be_disabled(timeout=240_000)
    page.close()
