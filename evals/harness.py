"""What does EleutherAI's lm-eval itself say of the model? Its tasks, prompts and metrics over our scorer.

lm-eval is imported here and nowhere else; a machine without it can run every other suite.
"""

import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs

from evals.hellaswag import Item
from evals.model import LoadedModel
from evals.results import EvalResult, Score
from evals.scoring import Request, Scorer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class HarnessModel(TemplateLM):
    """lm-eval's view of a model: it tokenizes as its own `hf` model, our scorer gives the numbers."""

    def __init__(self, model: LoadedModel, scorer: Scorer, progress: Progress | None = None):
        super().__init__()
        self.model, self.scorer, self.progress = model, scorer, progress
        self.truncated = 0
        self.names: list[str] = []

    @property
    def eot_token_id(self) -> int:
        return self.model.eot

    @property
    def max_length(self) -> int:
        return self.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.encode([string])[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.names = [f"{r.task_name} item {r.doc_id}, choice {r.idx}" for r in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [
            Request(name, tuple(context), tuple(continuation))
            for name, (_, context, continuation) in zip(self.names, requests, strict=True)
        ]
        scored = self.scorer.score(asked, self.progress)
        self.truncated += sum(s.truncated for s in scored)
        return [(s.logprob, s.greedy) for s in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Each text whole: windows of the context's length, each token once, the first after EOT."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for piece in _rolling(tokens, self.model.eot, self.model.context):
                name = f"{request.task_name} item {request.doc_id}"
                asked.append(Request(name, piece[0], piece[1]))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, scored in zip(owners, self.scorer.score(asked, self.progress), strict=True):
            sums[number] += scored.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text up to a stop sequence; sampling is refused, since its score would not repeat."""
        return [self._generate(request) for request in requests]

    def _generate(self, request: Instance) -> str:
        context, options = request.args
        if options.get("do_sample") or options.get("temperature", 0.0) > 0.0:
            raise ValueError(f"{request.task_name} wants sampled text ({options}): only greedy generation is scored")
        until = options.get("until", [])
        until = [until] if isinstance(until, str) else until
        return _greedy(self, context, until, options.get("max_gen_toks", 256))


def _greedy(harness: HarnessModel, context: str, until: Sequence[str], most: int) -> str:
    import torch

    tokens = harness.tok_encode(context) or [harness.model.eot]
    room = harness.model.context - most
    harness.truncated += len(tokens) > room
    made: list[int] = []
    ids = torch.tensor([tokens[-room:]], device=harness.model.device)
    cache = None
    with torch.inference_mode():
        while len(made) < most:
            out = harness.model.module(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made.append(int(ids))
            text = harness.model.decode(made)
            stops = [text.find(stop) for stop in until if stop and stop in text]
            if stops:
                return text[: min(stops)]
            if made[-1] == harness.model.eot:
                return harness.model.decode(made[:-1])
    return harness.model.decode(made)


def _rolling(tokens: Sequence[int], start: int, context: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) pieces that predict each token once, as lm-eval's rolling windows do."""
    line = (start, *tokens)
    for at in range(0, len(tokens), context):
        end = min(at + context, len(tokens))
        first = max(0, end - context)  # the last window is a full one, of which only the new tokens count
        yield line[first : at + 1], line[at + 1 : end + 1]


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    tasks: Sequence[str],
    task_path: str | None = None,
    limit: int = 0,
    shots: int | None = None,
    progress: Progress | None = None,
    suite: str = "eleuther",
) -> EvalResult:
    """lm-eval's tasks by name; those of `task_path`, a folder of task files, come before its own."""
    manager = TaskManager(include_path=task_path, include_defaults=True)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}: see `lm-eval ls tasks`")
    return _run(model, scorer, list(tasks), manager, limit, shots, progress, suite)


def evaluate_items(
    model: LoadedModel,
    scorer: Scorer,
    items: Sequence[Item],
    name: str = "completion_items",
    progress: Progress | None = None,
    suite: str = "eleuther",
) -> EvalResult:
    """lm-eval's own `hellaswag` task (its processing, metrics and aggregation) over a local set of items."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "items.jsonl"
        file.write_text("".join(json.dumps(_raw(item)) + "\n" for item in items))
        manager = TaskManager(include_defaults=False)
        return _run(model, scorer, [_task(name, file, Path(scratch))], manager, 0, None, progress, suite)


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
    tasks: list[Any],
    manager: TaskManager,
    limit: int,
    shots: int | None,
    progress: Progress | None,
    suite: str,
) -> EvalResult:
    harness = HarnessModel(model, scorer, progress)
    out = lm_eval.simple_evaluate(
        model=harness, tasks=tasks, task_manager=manager, limit=limit or None, num_fewshot=shots,
        bootstrap_iters=1000, log_samples=True,
    )  # fmt: skip
    assert out is not None  # only other ranks than the first get None
    counts = {task: n["effective"] for task, n in out["n-samples"].items()}
    scores = _scores(out["results"], counts)
    if not scores:
        raise ValueError(f"{suite}: lm-eval gave no score for {', '.join(map(str, counts))}")
    details = {
        "lm_eval": lm_eval.__version__,
        "tasks": {t: {"version": out["versions"].get(t), "shots": out["n-shot"].get(t)} for t in counts},
    }
    items = sum(counts.values())
    return EvalResult(
        suite,
        "harness",
        model.describe(),
        scores,
        items,
        harness.truncated,
        _per_item(out["samples"]),
        details,
    )


def _scores(results: dict[str, dict[str, Any]], counts: dict[str, int]) -> dict[str, Score]:
    """task/metric; lm-eval's keys are `acc,none` and `acc_stderr,none`, with a filter after the comma."""
    scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            stderr = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
            scores[name] = Score(float(value), stderr, counts.get(task, sum(counts.values())))
    return scores


def _per_item(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for task, entries in samples.items():
        for entry in entries:
            metrics = {m: float(entry[m]) for m in entry["metrics"] if isinstance(entry.get(m), (int, float))}
            rows.append(
                {
                    "task": task,
                    "item": entry["doc_id"],
                    "target": str(entry["target"]),
                    "responses": json.dumps(entry["filtered_resps"]),
                    "metrics": json.dumps(metrics),
                }
            )
    return rows
