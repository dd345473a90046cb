"""How long does the full HellaSwag validation set take with a 124M model, start to written scores?

    python -m benchmarks.hellaswag_full_set ITEMS.jsonl[.gz] [--model FOLDER]

Each dtype runs `python -m evals.run` as a user would, imports and loading included; without --model a random
124M GPT-2 is made, which takes as long as a trained one. The answer goes to stdout and to benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from storage import tokenizer

RESULTS = Path(__file__).parent / "results"


def random_gpt2(folder: str) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    vocabulary = tokenizer.VOCABULARY
    GPT2Tokenizer(vocab=str(vocabulary / "encoder.json"), merges=str(vocabulary / "vocab.bpe")).save_pretrained(folder)
    return folder


def measure(model: str, items: str, dtype: str, scratch: str) -> dict:
    out = Path(scratch) / f"{dtype}.json"
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "evals.run", model, "--suite", "hellaswag", "--items", items, "--out", str(out)]
        + ["--dtype", dtype],
        check=True,
    )
    page = json.loads(out.read_text())
    return {
        "dtype": dtype,
        "seconds_wall": round(time.monotonic() - started, 2),
        "seconds_of_the_eval": page["seconds"],
        "items": page["items"],
        "protocols": page["protocol"],
        "scores": {name: score["value"] for name, score in page["scores"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("items")
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or random_gpt2(f"{scratch}/gpt2-124m")
        answer = {
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "runs": [measure(model, args.items, dtype, scratch) for dtype in ("float32", "bfloat16")],
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hellaswag_full_set.json").write_text(json.dumps(answer, indent=2) + "\n")
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
