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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Clock:
    wall: float  # seconds
    cpu: float  # seconds of all threads: what stays comparable on a machine that does other work too

    @staticmethod
    def now() -> "Clock":
        return Clock(time.monotonic(), time.process_time())

    def since(self) -> "Clock":
        return Clock(time.monotonic() - self.wall, time.process_time() - self.cpu)


def theirs(
    folder: str, items: list[hellaswag.Item], device: str, batch: int, softmax: str
) -> tuple[dict[str, Any], Clock]:
    model = HFLM(folder, device=device, dtype="float32", softmax_dtype=softmax, batch_size=batch)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "items.jsonl"
        file.write_text("".join(json.dumps(harness._raw(item)) + "\n" for item in items))
        task = harness._task("items", file, Path(scratch))
        clock = Clock.now()
        out = lm_eval.simple_evaluate(
            model=model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000
        )
    assert out is not None
    return out, clock.since()


def ours(folder: str, items: list[hellaswag.Item], device: str) -> tuple[EvalResult, Clock]:
    model = load(folder, device)
    scorer = Scorer(model)
    clock = Clock.now()
    result = hellaswag.evaluate(model, scorer, items, "hellaswag", protocols=["harness"])
    return result, clock.since()


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
    _, their_time = theirs(args.model, items, device, args.batch, "float32")
    result, our_time = ours(args.model, items, device)
    out, _ = theirs(args.model, items, device, args.batch, "float64")
    answer = {
        "model": result.model | {"name": Path(args.model).name},
        "lm_eval": lm_eval.__version__,
        "batch_of_lm_eval": args.batch,
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "seconds_lm_eval": round(their_time.wall, 2),
        "seconds_ours": round(our_time.wall, 2),
        "ratio": round(their_time.wall / our_time.wall, 2),
        "cpu_seconds_lm_eval": round(their_time.cpu, 2),
        "cpu_seconds_ours": round(our_time.cpu, 2),
        "cpu_ratio": round(their_time.cpu / our_time.cpu, 2),
        **agreement(result, out),
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"evals_against_lm_eval_{Path(args.model).name}_{device.split(':')[0]}.json"
    (RESULTS / name).write_text(json.dumps(answer, indent=2) + "\n")
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
