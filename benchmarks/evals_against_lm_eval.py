"""Do our HellaSwag scores equal lm-eval's item by item, and how much sooner are they there?

    python -m benchmarks.evals_against_lm_eval MODEL ITEMS.jsonl[.gz] [--limit 1000] [--device cpu]

All in one process on the same items and model: lm-eval's own `hellaswag` with its `hf` model as it comes,
timed; the same with float64 in its softmax, which the log-probabilities are held against, since its fp32
sum over an ending of -300 rounds to 3e-5; and ours, timed. Needs lm-eval and accelerate. The answer goes to
stdout and, as JSON, to benchmarks/results/.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals import harness, hellaswag
from evals.model import load, pick_device
from evals.results import EvalResult
from evals.scoring import Scorer

RESULTS = Path(__file__).parent / "results"


def theirs(
    folder: str, items: list[hellaswag.Item], device: str, batch: int, softmax: str
) -> tuple[dict[str, Any], float]:
    model = HFLM(folder, device=device, dtype="float32", softmax_dtype=softmax, batch_size=batch)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "items.jsonl"
        file.write_text("".join(json.dumps(harness._raw(item)) + "\n" for item in items))
        task = harness._task("items", file, Path(scratch))
        started = time.monotonic()
        out = lm_eval.simple_evaluate(
            model=model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000
        )
    assert out is not None
    return out, time.monotonic() - started


def ours(folder: str, items: list[hellaswag.Item], device: str) -> tuple[EvalResult, float]:
    model = load(folder, device)
    scorer = Scorer(model)
    started = time.monotonic()
    result = hellaswag.evaluate(model, scorer, items, "hellaswag", protocols=["harness"])
    return result, time.monotonic() - started


def agreement(result: EvalResult, out: dict[str, Any]) -> dict[str, Any]:
    samples = sorted(out["samples"]["items"], key=lambda s: s["doc_id"])
    largest, near, differing = 0.0, [], []
    for row, sample in zip(result.per_item, samples, strict=True):
        expected = np.array([response[0] for response in sample["filtered_resps"]])
        largest = max(largest, float(np.abs(expected - np.array(row["logprobs"])).max()))
        best, second = np.sort(expected)[::-1][:2]
        if best - second < 2e-5:
            near.append(row["ind"])
        elif int(np.argmax(expected)) != row["choice"]:
            differing.append(row["ind"])
    scores = out["results"]["items"]
    return {
        "items": len(samples),
        "largest_difference": largest,
        "items_whose_two_best_lie_within_2e-5": near,
        "items_chosen_otherwise": differing,
        "acc": [result.scores["harness_acc"].value, scores["acc,none"]],
        "acc_norm": [result.scores["harness_acc_norm"].value, scores["acc_norm,none"]],
    }


def _processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(models)} x {models[0].split(': ')[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("items")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=1, help="lm-eval's batch; its default is 1")
    args = parser.parse_args()
    device = str(pick_device(args.device))
    items = hellaswag.read_items(args.items, args.limit)
    ours(args.model, items[:4], device)  # first calls pay for allocations and, on a GPU, for its libraries
    _, their_seconds = theirs(args.model, items, device, args.batch, "float32")
    result, our_seconds = ours(args.model, items, device)
    out, _ = theirs(args.model, items, device, args.batch, "float64")
    answer = {
        "model": result.model,
        "lm_eval": lm_eval.__version__,
        "batch_of_lm_eval": args.batch,
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "seconds_lm_eval": round(their_seconds, 2),
        "seconds_ours": round(our_seconds, 2),
        "ratio": round(their_seconds / our_seconds, 2),
        **agreement(result, out),
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"evals_against_lm_eval_{Path(args.model).name}_{device.split(':')[0]}.json"
    (RESULTS / name).write_text(json.dumps(answer, indent=2) + "\n")
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
