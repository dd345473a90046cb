"""The house stands as its plan says: who imports whom, what the README shows, which commands are documented."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from tiny_pipeline import ROOT

from pipeline.commands.main import build
from training.config import settable_keys
from training.recipes import recipe

ORDER = ["pipeline", "assets", "training", "evals", "storage"]  # each imports only from itself and those behind it
TORCH_FREE = {
    "training": {
        "attempts",
        "config",
        "recipes",
        "tokenization",
        "order",
        "schedule",
        "outliers",
        "metrics",
        "plan",
        "gpus",
        "launch",
        "processes",
    },
    "evals": {"reference", "report", "completion_items", "core_bundle", "results", "comparison"},
}
ONLY_IN = {"dagster": {"assets", "pipeline"}, "duckdb": {"storage"}, "torch": {"training", "evals"}}


def sources() -> Iterator[tuple[str, Path]]:
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("package", "path"), sources(), ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_imports_point_one_way(package: str, path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        if top in ORDER:
            assert ORDER.index(top) >= ORDER.index(package), f"{path} imports {module}"
        if top in ONLY_IN:
            assert package in ONLY_IN[top], f"{path} imports {module}"


def test_orchestration_loads_no_torch() -> None:
    code = "import sys, pipeline.definitions, pipeline.commands.main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_torch_free_files_load_no_torch() -> None:
    modules = [f"{package}.{name}" for package, names in TORCH_FREE.items() for name in sorted(names)]
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_and_evals_run_where_there_is_neither_dagster_nor_duckdb() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package, path in sources()
        if package in ("training", "evals") and path.stem != "__init__"
    ]
    absent = ["dagster", "duckdb", "datasets", "s3fs", "lm_eval", "rich"]
    # None in sys.modules makes an import fail as if the package were not installed
    modules = [m for m in modules if not m.startswith("evals.harness")]  # lm-eval, loaded by its own suites only
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_from_shards_needs_only_what_the_documentation_names() -> None:
    absent = ["pyarrow", "transformers", "dagster", "duckdb", "datasets", "s3fs", "pandas", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import training.train, training.launch"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_file_states_the_question_it_answers() -> None:
    for _, path in sources():
        if path.stem != "__init__":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_name_says_nothing() -> None:
    assert not [path for _, path in sources() if path.stem in ("utils", "common", "helpers", "misc")]


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = re.search(r"```text\n(workspace\.yaml.*?)```", readme(), re.DOTALL)
    assert tree, "the README shows no tree"
    shown = {line.split()[0].rstrip("/") for line in tree[1].splitlines() if line and not line[0].isspace()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert shown == folders | {"workspace.yaml"}


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/NOTES.md", *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_what_is_there(page: Path) -> None:
    """No placeholder; every picture, page, file, module and setting that it names exists."""
    text = page.read_text()
    assert "<!--" not in text
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(rf"\b(?:{'|'.join(ORDER)}|benchmarks|tests|docs)/[\w/.]+\.(?:py|md|sh|json|png)\b", text):
        assert (ROOT / file).exists(), file
    for module in re.findall(r"-m ((?:training|evals|benchmarks)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    settings = {name for key in settable_keys(recipe("demo")) for name in (key, key.split(".")[-1])}
    for key in re.findall(r"--set ([a-z][\w.]*)=", text):
        assert key in settings | {"model"}, key


def test_commands_that_only_ask_do_not_load_dagster() -> None:
    code = "import sys, pipeline.commands.main; assert 'dagster' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def commands(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        for sub, inner in command.commands.items():  # type: ignore[attr-defined]
            yield from commands(inner, f"{name} {sub}")
    else:
        yield name


def test_every_command_is_documented() -> None:
    pages = readme() + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for command in commands(typer.main.get_command(build()), "gpt2"):
        assert command in pages, f"`{command}` is in neither README.md nor docs/"
