"""How long does the full HellaSwag validation set take with a 124M model, from loading to written scores, and why?

    python -m benchmarks.hellaswag_full_set ITEMS.jsonl[.gz] [--model FOLDER] [--dtype bfloat16 float32] [--limit N]

Both protocols, 80,336 continuations, in this process; without --model a random 124M GPT-2 is made first, untimed, which
takes as long as a trained one. One line of JSON a dtype, at once: seconds to load, tokenize (in a thread of its own,
beside the GPU), score and write, their total, and what importing torch and transformers took before. For each protocol:
what the device spent in the blocks and in the head, token positions with and without padding, FLOPs and their rate in
both. Two lines of JSON in a process show what the first one pays for the device's libraries. With --kernels a table of
the device's kernels follows, of one batch of middling rows. All but that goes to benchmarks/results/ as well.
float32 is evals.run's default, multiplied in full fp32; bfloat16 is `evals.dtype=bf16`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from evals import hellaswag, results  # noqa: E402
from evals.model import LoadedModel, load, pick_device  # noqa: E402
from evals.scoring import Picks, Request, Row, Scored, Scorer, _batches, _rows  # noqa: E402
from storage import tokenizer  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "hellaswag_full_set.json"


class Span:
    """Seconds of the device between two moments of its queue, or of this process where it is a CPU."""

    def __init__(self, device: torch.device):
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self.clock = time.monotonic()
        if self.marks:
            self.marks[0].record()

    def end(self) -> "Span":
        if self.marks:
            self.marks[1].record()
        self.clock = time.monotonic() - self.clock
        return self

    @property
    def seconds(self) -> float:
        return self.marks[0].elapsed_time(self.marks[1]) / 1000 if self.marks else self.clock


@dataclass
class Work:
    """What the scorer did for one protocol."""

    wall: float = 0.0
    rows: int = 0
    batches: int = 0
    positions: int = 0
    padded: int = 0
    predicted: int = 0  # positions that the head ran on
    squares: int = 0  # sum of squared widths: attention's work


class Watched(Scorer):
    """The scorer, which counts and times what it does."""

    def __init__(self, model: LoadedModel):
        self.works: list[Work] = [Work()]
        self.spans: list[tuple[list[Span], list[Span]]] = [([], [])]
        super().__init__(model)

    def score(self, requests: Sequence[Request], progress: Any = None) -> list[Scored]:
        self.works.append(Work())
        self.spans.append(([], []))
        began = time.monotonic()
        scored = super().score(requests, progress)
        self.works[-1].wall = time.monotonic() - began
        return scored

    def _run(self, tokens: Tensor, attention: dict[str, Tensor]) -> Tensor:
        work, span = self.works[-1], Span(tokens.device)
        out = super()._run(tokens, attention)
        self.spans[-1][0].append(span.end())
        work.rows, work.batches = work.rows + len(tokens), work.batches + 1
        work.padded, work.squares = work.padded + tokens.numel(), work.squares + tokens.numel() * tokens.shape[1]
        return out

    def _forward(self, rows: list[Row]) -> Any:
        self.works[-1].positions += sum(row.length for row in rows)
        return super()._forward(rows)

    def _token_logprobs(self, picked: Tensor, picks: Picks) -> tuple[Tensor, Tensor]:
        self.works[-1].predicted += len(picked)
        span = Span(picked.device)
        out = super()._token_logprobs(picked, picks)
        self.spans[-1][1].append(span.end())
        return out

    def told(self, number: int) -> dict[str, Any]:
        """One protocol's counts, FLOPs of matrix products alone and their rate."""
        work, (blocks, head) = self.works[number], self.spans[number]
        config = self.model.module.config
        matrices = [p.numel() for n, p in self.model.module.named_parameters() if p.ndim == 2 and ".h." in n]
        flops = {
            "blocks": 2 * sum(matrices) * work.padded,
            "attention": 4 * config.n_embd * config.n_layer * work.squares,
            "head": 2 * config.n_embd * config.vocab_size * work.predicted,
        }
        seconds = {"blocks": sum(s.seconds for s in blocks), "head": sum(s.seconds for s in head)}
        rates = {
            "blocks": (flops["blocks"] + flops["attention"]) / seconds["blocks"],
            "head": flops["head"] / seconds["head"],
        }
        return {
            "score_wall": round(work.wall, 2),
            "device_seconds": {name: round(value, 2) for name, value in seconds.items()},
            "device_idle": round(work.wall - sum(seconds.values()), 2),
            "tflop": {name: round(value / 1e12, 1) for name, value in flops.items()},
            "tflop_per_second": {name: round(value / 1e12, 1) for name, value in rates.items()},
            "rows": work.rows, "batches": work.batches, "positions": work.positions, "padded": work.padded,
            "predicted": work.predicted,
        }  # fmt: skip


def random_gpt2(folder: str) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    vocabulary = tokenizer.VOCABULARY
    GPT2Tokenizer(vocab=str(vocabulary / "encoder.json"), merges=str(vocabulary / "vocab.bpe")).save_pretrained(folder)
    return folder


def measure(folder: str, items: str, dtype: str, device: str, limit: int, out: Path) -> tuple[dict[str, Any], Watched]:
    clock = time.monotonic()
    model = load(folder, device, dtype)
    scorer = Watched(model)
    loaded = time.monotonic()
    tokenizing = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        began = time.monotonic()
        made = model.encode(texts)
        tokenizing.append(time.monotonic() - began)
        return made

    found = hellaswag.evaluate(replace(model, encode=encode), scorer, hellaswag.read_items(items, limit), "hellaswag")
    scored = time.monotonic()
    results.publish(found, str(out / f"{dtype}.json"), scored - clock)
    done = time.monotonic()
    seconds = {
        "load": loaded - clock,
        "evaluate": scored - loaded,
        "tokenize": sum(tokenizing),
        "tokenize_before_the_first_batch": sum(tokenizing[:2]),
        "write": done - scored,
        "total": done - clock,
    }
    answer = {
        "dtype": dtype,
        "items": found.items,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "protocols": {name: scorer.told(n) for n, name in enumerate(hellaswag.PROTOCOLS, start=1)},
        "scores": {name: round(score.value, 4) for name, score in found.scores.items()},
    }
    return answer, scorer


def kernels(scorer: Watched, items: str) -> str:
    """The device's time of one batch of middling rows, by kernel."""
    found = hellaswag.read_items(items)
    asked = hellaswag.requests(found, "completion", scorer.model)
    batches = list(_batches(_rows(asked, scorer.model.context, True), lambda: scorer.batch_tokens))
    batch = batches[len(batches) // 2]
    scorer._forward(batch)
    on_gpu = scorer.model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as seen:
        scorer._forward(batch)
        if on_gpu:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items")
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=0, help="only the first items; 0: all")
    parser.add_argument("--kernels", action="store_true", help="tell what one batch of each dtype spends its time on")
    args = parser.parse_args()
    from transformers import GPT2LMHeadModel  # noqa: F401 - timed with the other imports

    device = pick_device(args.device)
    head = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds_of_imports": round(time.monotonic() - STARTED, 2),
    }
    print(json.dumps(head), flush=True)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_gpt2(f"{scratch}/gpt2-124m")
        for dtype in args.dtype:
            answer, scorer = measure(folder, args.items, dtype, str(device), args.limit, Path(scratch))
            runs.append(answer)
            print(json.dumps(answer), flush=True)
            if args.kernels:
                print(kernels(scorer, args.items), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(head | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
