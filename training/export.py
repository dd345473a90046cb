"""How does a run become a model that others load? A stock Hugging Face folder, or an llm.c file, checked.

    python -m training.export RUN_FOLDER --out FOLDER --tokens SHARD [--dtype float32|bfloat16] [--step N]
    python -m training.export RUN_FOLDER --out MODEL.bin

The folder is loaded back with stock transformers and its logits on the shard's first tokens are compared with those
of the same rounded weights here: `export_check.json` has the largest difference, and beside it that from the
checkpoint's own weights. Exit status 1 where the first is above the tolerance.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from storage import events, objects
from storage.shards import read_header, read_tokens
from storage.tokenizer import VOCABULARY
from training.models import Model
from training.weights import huggingface_config, load_any, load_run, to_huggingface, write_llmc

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}
CHECK = "export_check.json"
TOLERANCE = 1e-4  # largest absolute difference of fp32 logits; times the logits' size in tens where that is more

log = logging.getLogger("gpt2.export")


def write_folder(model: Model, out: str, dtype: torch.dtype) -> None:
    """Weights, configuration and tokenizer as transformers expects them."""
    from transformers import AutoModelForCausalLM

    c = model.config
    weights = {n: w.to(dtype) for n, w in to_huggingface(model.state_dict(), c).items()}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(huggingface_config(c))
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.config.dtype = dtype
    theirs.save_pretrained(out)
    _write_tokenizer(out, c.context)


def _write_tokenizer(out: str, context: int) -> None:
    """Today's tokenizer.json, and the two files that other programs look for."""
    from transformers import GPT2Tokenizer

    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(VOCABULARY / source, Path(out, name))
    tokenizer = GPT2Tokenizer(vocab=str(Path(out, "vocab.json")), merges=str(Path(out, "merges.txt")))
    # transformers 5 takes other arguments than these silently, for an empty vocabulary
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(out)


@torch.no_grad()
def check(model: Model, out: str, shard: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare stock transformers' logits of the exported folder with ours, computed in fp32.

    The tolerance is for the same weights, rounded to `dtype`; what the rounding does to the checkpoint's is told.
    """
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(read_tokens(shard, 0, model.config.context).astype("int64"))[None]  # (1, T)
    exact = model.logits(tokens)
    ours = exact if dtype == torch.float32 else model.to(dtype).float().logits(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    largest = float(ours.abs().max())
    return {
        "max_difference": float((ours - theirs).abs().max()),
        "checkpoint_difference": float((exact - theirs).abs().max()),
        "tolerance": TOLERANCE * max(1.0, largest / 10),
        "largest_logit": largest,
        "tokens": tokens.numel(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.export", description="Export a run's newest checkpoint.")
    parser.add_argument("run", help="a run folder; also a Hugging Face folder or an llm.c .bin, to convert")
    parser.add_argument("--out", required=True, help="folder to write, or a name ending in .bin for llm.c")
    parser.add_argument("--tokens", help="token shard whose logits are compared; needed for a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step (default: the newest)")
    o = parser.parse_args(argv)
    if o.tokens is None and not o.out.endswith(".bin"):
        parser.error("--tokens SHARD is needed: the exported model's logits are checked on it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        if not objects.is_local(o.out):
            raise ValueError(f"--out {o.out}: the model is written to a local folder or file")
        if o.tokens and not objects.exists(o.tokens):
            raise ValueError(f"--tokens {o.tokens} does not exist: give a token shard, such as a run's _val_000000.bin")
        if o.tokens:
            read_header(o.tokens)  # which refuses what is no shard
        model = load_any(o.run) if o.step is None else load_run(o.run, o.step)
        if o.out.endswith(".bin"):
            write_llmc(o.out, {n: w.to(DTYPES[o.dtype]) for n, w in model.state_dict().items()}, model.config)
            return 0
    except ValueError as error:
        log.error("%s", error)
        events.refuse(str(error))
        return 2
    return export_folder(model, o.out, o.tokens, DTYPES[o.dtype])


def export_folder(model: Model, out: str, shard: str, dtype: torch.dtype) -> int:
    write_folder(model, out, dtype)
    result = check(model, out, shard, dtype)
    Path(out, CHECK).write_text(json.dumps(result, indent=2) + "\n")
    log.info(
        "exported %s: logits differ by at most %.2g, from the checkpoint's by %.2g",
        out, result["max_difference"], result["checkpoint_difference"],
    )  # fmt: skip
    if result["max_difference"] <= result["tolerance"]:
        return 0
    log.error(
        "logits differ by %.2g, above the tolerance of %.2g: stock transformers does not compute this model from %s",
        result["max_difference"], result["tolerance"], out,
    )  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main())
