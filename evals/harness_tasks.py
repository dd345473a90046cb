"""Which of lm-eval's tasks make up a suite, and which task files are a folder's own? lm-eval is not needed to know."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Part:
    """One task, or group of tasks, of lm-eval in a suite."""

    task: str
    shots: int | None = None  # few-shot examples; None: as the task says
    metric: str = ""  # its share in the suite's average; empty: none


# what Hugging Face's first Open LLM Leaderboard ran, and the discussion with it (at a commit of lm-eval of 2023:
# today's harness renders some prompts otherwise, so those numbers are not claimed)
SUITES = {
    "leaderboard-v1": (
        Part("arc_challenge", 25, "acc_norm"),
        Part("hellaswag", 10, "acc_norm"),
        Part("mmlu", 5, "acc"),
        Part("truthfulqa_mc2", 0, "acc"),
        Part("winogrande", 5, "acc"),
        Part("gsm8k", 5, "exact_match,strict-match"),
    ),
    "zero-shot": (
        Part("lambada_openai", 0, "acc"),
        Part("piqa", 0, "acc_norm"),
        Part("arc_easy", 0, "acc_norm"),
        Part("wikitext", 0),
    ),
}


class _Plain(yaml.SafeLoader):
    """Reads lm-eval's files without what they have code for."""


_Plain.add_multi_constructor("!", lambda loader, tag, node: None)


def all_own(names: list[str], folder: str) -> bool:
    """Whether task files in the folder define all of these tasks and groups, and all that the groups name."""
    files = [_read(file) for file in Path(folder).rglob("*.yaml")]
    tasks = {page["task"] for page in files if isinstance(page.get("task"), str)}
    groups = {page["group"]: page.get("task") for page in files if "group" in page}

    def own(name: str) -> bool:
        return name in tasks or (name in groups and all(own(part) for part in _named(groups[name])))

    return all(own(name) for name in names)


def _read(file: Path) -> dict[str, Any]:
    try:
        page = yaml.load(file.read_text(), _Plain)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no task file of lm-eval's: {error}") from None
    return page if isinstance(page, dict) else {}


def _named(part: Any) -> Iterator[str]:
    """The tasks of a group's `task`: a name, a list, or a task or group written out."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        yield from _named(part.get("task"))
    else:
        for one in part or ():
            yield from _named(one)
