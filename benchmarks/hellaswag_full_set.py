"""How long does the full HellaSwag validation set take with a 124M model, from loading to written scores?

    python -m benchmarks.hellaswag_full_set ITEMS.jsonl[.gz] [--model FOLDER] [--dtype bfloat16 float32] [--limit N]

Both protocols, 80,336 continuations, in this process; without --model a random 124M GPT-2 is made first, untimed, which
takes as long as a trained one. One line of JSON a dtype, at once: seconds to load, tokenize, score and write, their
total, and what importing torch and transformers took before. All of it goes to benchmarks/results/ as well.
float32 is evals.run's default, multiplied in full fp32; bfloat16 is `evals.dtype=bf16`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch  # noqa: E402

from evals import hellaswag, results  # noqa: E402
from evals.model import load, pick_device  # noqa: E402
from evals.scoring import Scorer  # noqa: E402
from storage import tokenizer  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "hellaswag_full_set.json"


def random_gpt2(folder: str) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    vocabulary = tokenizer.VOCABULARY
    GPT2Tokenizer(vocab=str(vocabulary / "encoder.json"), merges=str(vocabulary / "vocab.bpe")).save_pretrained(folder)
    return folder


def measure(folder: str, items: str, dtype: str, device: str, limit: int, out: Path) -> dict[str, Any]:
    clock = time.monotonic()
    model = load(folder, device, dtype)
    scorer = Scorer(model)
    loaded = time.monotonic()
    tokenizing = 0.0

    def encode(texts: Sequence[str]) -> list[list[int]]:
        nonlocal tokenizing
        began = time.monotonic()
        made = model.encode(texts)
        tokenizing += time.monotonic() - began
        return made

    found = hellaswag.evaluate(replace(model, encode=encode), scorer, hellaswag.read_items(items, limit), "hellaswag")
    scored = time.monotonic()
    results.publish(found, str(out / f"{dtype}.json"), scored - clock)
    done = time.monotonic()
    seconds = {
        "load": loaded - clock,
        "tokenize": tokenizing,
        "score": scored - loaded - tokenizing,
        "write": done - scored,
        "total": done - clock,
    }
    return {
        "dtype": dtype,
        "items": found.items,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "scores": {name: round(score.value, 4) for name, score in found.scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items")
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=0, help="only the first items; 0: all")
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
            runs.append(measure(folder, args.items, dtype, str(device), args.limit, Path(scratch)))
            print(json.dumps(runs[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(head | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
