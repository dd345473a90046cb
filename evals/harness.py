"""What does EleutherAI's lm-eval itself say of the model? Its tasks, prompts and metrics over our scorer.

lm-eval is imported here and in harness_model.py only; a machine without it can run every other suite.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs

from evals.harness_model import HarnessModel, Progress
from evals.harness_tasks import Part
from evals.hellaswag import Item
from evals.model import LoadedModel
from evals.results import EvalResult, Score, average
from evals.scoring import Scorer

LOCAL_TASK = "completion_items"  # what its hellaswag over local items is called in scores
BOOTSTRAPS = 1000  # resamples for the error of a metric that is no mean, such as word perplexity


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    parts: Sequence[Part],
    task_path: str = "",
    limit: int = 0,
    progress: Progress | None = None,
    suite: str = "eleuther",
) -> EvalResult:
    """lm-eval's tasks by name; those of `task_path`, a folder of task files, come before its own."""
    manager = _manager([part.task for part in parts], task_path)
    results = [_run(model, scorer, part.task, part.task, manager, limit, part.shots, progress, suite) for part in parts]
    return _together(suite, parts, results)


def _manager(tasks: Sequence[str], task_path: str) -> TaskManager:
    """Raises ValueError for an unknown task. lm-eval's own tasks take 8 s to read: only where they are wanted."""
    if task_path:
        manager = TaskManager(include_path=task_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=task_path or None, include_defaults=True)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}: see `lm-eval ls tasks`")
    return manager


def _together(suite: str, parts: Sequence[Part], results: Sequence[EvalResult]) -> EvalResult:
    """One result of all parts, with the mean of their headline scores where each has one."""
    scores = {name: score for result in results for name, score in result.scores.items()}
    wanted = [f"{part.task}/{part.metric}" for part in parts if part.metric]
    if len(wanted) > 1:
        scores = {"average": average([scores[name] for name in wanted])} | scores
    return EvalResult(
        suite,
        "harness",
        results[0].model,
        scores,
        sum(result.items for result in results),
        sum(result.truncated for result in results),
        [row for result in results for row in result.per_item],
        {
            "lm_eval": lm_eval.__version__,
            "average_of": wanted,
            "lower_is_better": [name for result in results for name in result.details["lower_is_better"]],
            "tasks": {name: facts for result in results for name, facts in result.details["tasks"].items()},
        },
        sum(result.wanted or 0 for result in results),
    )


def evaluate_items(
    model: LoadedModel,
    scorer: Scorer,
    items: Sequence[Item],
    progress: Progress | None = None,
    suite: str = "eleuther",
) -> EvalResult:
    """lm-eval's own `hellaswag` task (its processing, metrics and aggregation) over a local set of items."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "items.jsonl"
        file.write_text("".join(json.dumps(_raw(item)) + "\n" for item in items))
        manager = TaskManager(include_defaults=False)
        task = _task(LOCAL_TASK, file, Path(scratch))
        return _run(model, scorer, LOCAL_TASK, task, manager, 0, None, progress, suite)


def _task(name: str, items: Path, scratch: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(items)}, "cache_dir": str(scratch / "cache")},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _raw(item: Item) -> dict[str, Any]:
    return {
        "ind": item.ind, "activity_label": item.activity, "ctx_a": item.context_a, "ctx_b": item.context_b,
        "ctx": item.context, "endings": list(item.endings), "label": str(item.label),
    }  # fmt: skip


def _run(
    model: LoadedModel,
    scorer: Scorer,
    name: str,
    task: str | dict[str, Any],
    manager: TaskManager,
    limit: int,
    shots: int | None,
    progress: Progress | None,
    suite: str,
) -> EvalResult:
    harness = HarnessModel(model, scorer, progress)
    with _naming(name):
        out = lm_eval.simple_evaluate(
            model=harness, tasks=[task], task_manager=manager, limit=limit or None, num_fewshot=shots,
            bootstrap_iters=BOOTSTRAPS, log_samples=True,
        )  # fmt: skip
    assert out is not None  # only other ranks than the first get None
    counts = {task: n["effective"] for task, n in out["n-samples"].items()}
    scores = _scores(out)
    if not scores or not all(counts.values()):
        raise ValueError(f"{suite}: lm-eval's task {name} gave no score (items: {counts})")
    lower = [name for name in scores if _lower_is_better(*_task_and_metric(name), out)]
    facts = {
        task: {"version": out["versions"].get(task), "shots": out["n-shot"].get(task), "items": counts[task],
               "truncated": harness.truncated[task]}
        for task in counts
    }  # fmt: skip
    return EvalResult(
        suite,
        "harness",
        model.describe(),
        scores,
        sum(counts.values()),
        harness.truncated.total(),
        _per_item(out["samples"]),
        {"lm_eval": lm_eval.__version__, "lower_is_better": lower, "tasks": facts},
        sum(min(limit or n["original"], n["original"]) for n in out["n-samples"].values()),
    )


@contextlib.contextmanager
def _naming(task: str) -> Iterator[None]:
    """Says which task an error came from; lm-eval's own errors often name a data set or a split only."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"lm-eval's task {task} failed: {error}") from error
    except Exception as error:
        raise RuntimeError(f"lm-eval's task {task} failed: {type(error).__name__}: {error}") from error


def _scores(out: dict[str, Any]) -> dict[str, Score]:
    """task/metric; lm-eval's keys are `acc,none` and `acc_stderr,none`, with a filter after the comma."""
    scores = {}
    for task, values in out["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            stderr = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
            scores[name] = Score(float(value), stderr, _items_of(task, out))
    return scores


def _task_and_metric(score: str) -> tuple[str, str]:
    task, _, metric = score.partition(",")[0].rpartition("/")
    return task, metric


def _lower_is_better(task: str, metric: str, out: dict[str, Any]) -> bool:
    """In lm-eval's own words; of a group, what it says of the group's tasks, as it says nothing of groups of groups."""
    if task in out["n-samples"]:
        return out["higher_is_better"][task].get(metric) is False
    return any(_lower_is_better(part, metric, out) for part in out["group_subtasks"][task])


def _items_of(task: str, out: dict[str, Any]) -> int:
    """Of a task, or of all in a group of tasks and groups."""
    if task in out["n-samples"]:
        return int(out["n-samples"][task]["effective"])
    return sum(_items_of(part, out) for part in out["group_subtasks"][task])


def _per_item(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for task, entries in samples.items():
        for entry in entries:
            metrics = {m: float(entry[m]) for m in entry["metrics"] if isinstance(entry.get(m), (int, float))}
            rows.append(
                {
                    "task": task,
                    "item": entry["doc_id"],
                    "filter": entry["filter"],
                    "target": str(entry["target"]),
                    "responses": json.dumps(entry["filtered_resps"]),
                    "metrics": json.dumps(metrics),
                }
            )
    return rows
