"""Is the model GPT-2 grade? DCLM's CORE: 22 tasks, each accuracy centred between chance and 1, averaged.

The tasks, their few-shot examples and the order of items follow nanochat, whose numbers for the released GPT-2
stand in evals/reference.py (0.256525 for gpt2-xl). Their data is a bundle: evals/core_bundle.py.
"""

import csv
import io
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evals.core_bundle import BUNDLE, digest
from evals.model import LoadedModel
from evals.results import EvalResult, Score, average, mean_score
from evals.scoring import Request, Scored, Scorer
from storage import objects

log = logging.getLogger(__name__)

TASKS = 22
PARTIAL = "partial_core"  # the name of a mean over fewer tasks, or over some items of each
SHUFFLE_SEED = 1337  # of a task's items
SHOTS_SEED = 1234  # plus the item's number: of its few-shot examples

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Task:
    label: str
    kind: str  # multiple_choice: one context, many ends; schema: many contexts, one end; language_modeling
    items: tuple[dict[str, Any], ...]
    shots: int
    delimiter: str  # between context and continuation
    chance: float  # accuracy of a guess, 0 to 1


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    bundle: str,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score every task of the bundle; `limit` is in items a task, and such a score is no CORE."""
    tasks = read_bundle(bundle)
    scores: dict[str, Score] = {}
    per_item: list[dict[str, Any]] = []
    cut = 0
    for number, task in enumerate(tasks):
        asked = requests(task, model.encode, model.eot, limit)
        cropped = [[crop(request, model.context) for request in group] for group in asked]
        cut += sum(a != b for group, fit in zip(asked, cropped, strict=True) for a, b in zip(group, fit, strict=True))
        scored = iter(scorer.score([request for group in cropped for request in group]))
        right = [
            _is_right(task, item, [next(scored) for _ in group])
            for item, group in zip(task.items, cropped, strict=False)
        ]
        accuracy = mean_score([float(r) for r in right])
        scores[task.label] = accuracy
        scores[f"{task.label}/centred"] = centred(accuracy, task.chance)
        per_item += [{"task": task.label, "item": n, "correct": r} for n, r in enumerate(right)]
        log.info("%s: accuracy %.4f over %d items", task.label, accuracy.value, accuracy.n)
        if progress:
            progress(number + 1, len(tasks))
    complete = len(tasks) == TASKS and not limit
    # a mean of fewer tasks or items has another name: nothing may be held against published numbers of CORE
    together = {"core" if complete else PARTIAL: average([scores[f"{task.label}/centred"] for task in tasks])}
    details = {
        "tasks": {t.label: {"kind": t.kind, "shots": t.shots, "chance": t.chance} for t in tasks},
        "complete": complete,
        "bundle_sha256": digest(bundle),
    }
    wanted = sum(min(limit or len(task.items), len(task.items)) for task in tasks)
    return EvalResult(
        "core", "nanochat's CORE", model.describe(), together | scores, len(per_item), cut, per_item, details, wanted
    )


def centred(accuracy: Score, chance: float) -> Score:
    """0 is a guess, 1 is perfect."""
    scale = 1 - chance
    stderr = None if accuracy.stderr is None else accuracy.stderr / scale
    return Score((accuracy.value - chance) / scale, stderr, accuracy.n)


def read_bundle(folder: str) -> list[Task]:
    """Raises ValueError naming the task whose data or chance is missing."""
    page = objects.join(folder, "core.yaml")
    if not objects.exists(page):
        raise ValueError(f"{folder} holds no core.yaml: give the folder of CORE's bundle, unpacked from {BUNDLE}")
    table = io.StringIO(objects.read_text(objects.join(folder, "eval_meta_data.csv")))
    chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(table)}
    return [_task(folder, entry, chances) for entry in yaml.safe_load(objects.read_text(page))["icl_tasks"]]


def _task(folder: str, entry: dict[str, Any], chances: dict[str, float]) -> Task:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in PROMPTS:
        raise ValueError(f"CORE task {label} is of kind {kind!r}: expected one of {', '.join(PROMPTS)}")
    if label not in chances:
        raise ValueError(f"CORE task {label} has no chance level in eval_meta_data.csv")
    data = objects.join(folder, "eval_data", entry["dataset_uri"])
    if not objects.exists(data):
        raise ValueError(f"CORE task {label} has no data: {data} is missing; remove {folder}, to have it fetched again")
    items = [json.loads(line) for line in io.StringIO(objects.read_text(data)) if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(items)
    shots = entry["num_fewshot"][0]
    if len(items) <= shots:
        raise ValueError(f"CORE task {label} has {len(items)} items, too few for {shots} few-shot examples")
    return Task(label, kind, tuple(items), shots, entry.get("continuation_delimiter", " "), chances[label])


def requests(task: Task, encode: Encode, start: int, limit: int = 0) -> list[list[Request]]:
    """The requests of each item, in order: one a choice, or one alone for language modelling."""
    count = min(limit, len(task.items)) if limit else len(task.items)
    prompts = [
        PROMPTS[task.kind](task, item, _examples(task, number)) for number, item in enumerate(task.items[:count])
    ]
    encoded = iter(encode([text for several in prompts for text in several]))
    asked = []
    for number, several in enumerate(prompts):
        tokens = [(start, *next(encoded)) for _ in several]
        name = f"CORE {task.label} item {number}"
        asked.append([Request(name, *pair) for pair in SPLITS[task.kind](tokens, name)])
    return asked


def _examples(task: Task, number: int) -> list[dict[str, Any]]:
    """The few-shot examples of an item: others of its task, drawn by its number."""
    others = [n for n in range(len(task.items)) if n != number]
    return [task.items[n] for n in random.Random(SHOTS_SEED + number).sample(others, task.shots)]


def _choice_prompts(task: Task, item: dict[str, Any], examples: list[dict[str, Any]]) -> list[str]:
    shown = "".join(f"{e['query']}{task.delimiter}{e['choices'][e['gold']]}\n\n" for e in examples)
    return [f"{shown}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]


def _schema_prompts(task: Task, item: dict[str, Any], examples: list[dict[str, Any]]) -> list[str]:
    shown = "".join(f"{e['context_options'][e['gold']]}{task.delimiter}{e['continuation']}\n\n" for e in examples)
    return [f"{shown}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]


def _language_prompts(task: Task, item: dict[str, Any], examples: list[dict[str, Any]]) -> list[str]:
    """Without and with the continuation; the first ends without the space that the first token after it carries."""
    shown = "".join(f"{e['context'].strip()}{task.delimiter}{e['continuation']}\n\n" for e in examples)
    context = f"{shown}{item['context'].strip()}{task.delimiter}"
    return [context.strip(), context + item["continuation"]]


Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # context, continuation


def _after_common_start(tokens: list[Tokens], name: str) -> list[Pair]:
    shared = _common(tokens)
    return [(line[:shared], line[shared:]) for line in tokens]


def _common_end(tokens: list[Tokens], name: str) -> list[Pair]:
    shared = _common([line[::-1] for line in tokens])
    return [(line[: len(line) - shared], line[len(line) - shared :]) for line in tokens]


def _rest(tokens: list[Tokens], name: str) -> list[Pair]:
    without, whole = tokens
    if whole[: len(without)] != without:
        raise ValueError(f"{name} can't be scored: its context is not a prefix of the whole in tokens")
    return [(without, whole[len(without) :])]


def _common(lines: list[Tokens]) -> int:
    """Length of the common start."""
    shortest = min(len(line) for line in lines)
    return next((n for n in range(shortest) if len({line[n] for line in lines}) > 1), shortest)


PROMPTS: dict[str, Callable[[Task, dict[str, Any], list[dict[str, Any]]], list[str]]] = {
    "multiple_choice": _choice_prompts,
    "schema": _schema_prompts,
    "language_modeling": _language_prompts,
}
SPLITS: dict[str, Callable[[list[Tokens], str], list[Pair]]] = {
    "multiple_choice": _after_common_start,
    "schema": _common_end,
    "language_modeling": _rest,
}


def crop(request: Request, context: int) -> Request:
    """The last `context` tokens, the final one included though it is no input: so nanochat scored GPT-2."""
    excess = len(request.context) + len(request.continuation) - context
    if excess <= 0:
        return request
    if excess >= len(request.context):
        raise ValueError(f"{request.name} can't be scored: its continuation alone fills the context of {context}")
    return Request(request.name, request.context[excess:], request.continuation)


def _is_right(task: Task, item: dict[str, Any], scored: Sequence[Scored]) -> bool:
    """Language modelling: every token was the likeliest. Choices: the right one has the best mean log-probability."""
    if task.kind == "language_modeling":
        return scored[0].greedy
    means = [s.logprob / s.tokens for s in scored]
    return means.index(max(means)) == item["gold"]
