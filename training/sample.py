"""What does the model write? Sampling from a run's newest checkpoint or a Hugging Face folder.

python -m training.sample RUN_FOLDER|HF_FOLDER "prompt" [--tokens N] [--temperature X] [--top-k N]
    [--top-p X] [--seed N]
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage import tokenizer
from training.gpt2 import GPT2
from training.weights import load_any

SAMPLES = "samples.txt"


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: Sequence[int],
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` by `tokens` tokens, drawn on the CPU: the same seed gives the same text anywhere.

    An empty prompt starts a document: with EOT, the last token of the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt) or [model.config.vocab - 1]
    for _ in range(tokens):
        text.append(draw(_next_logits(model, text), temperature, top_k, top_p, generator))
    return text[-tokens:]


def _next_logits(model: GPT2, text: Sequence[int]) -> Tensor:
    """Logits (V,) of the token after `text`. On a GPU always over the whole context, so that nothing recompiles."""
    device, context = model.wte.weight.device, model.config.context
    window = text[-context:]
    width = context if device.type == "cuda" else len(window)
    padded = torch.tensor([[*window, *[0] * (width - len(window))]], device=device)
    last = model.hidden(padded)[0, len(window) - 1]  # (C,), which does not see the padding behind it
    return (model.wte.weight[: model.config.vocab] @ last).float().cpu()


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token from logits (V,); a temperature of 0 takes the likeliest, a top_k of 0 leaves all."""
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).sort(descending=True)
    probabilities = values.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # mass of the likelier tokens
    kept = before < top_p
    if top_k:
        kept[top_k:] = False
    probabilities = torch.where(kept, probabilities, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def record(run: str, step: int, text: str) -> None:
    """Put the text into the run's samples.txt, in place of any of this step or a later one."""
    path = Path(run, SAMPLES)
    blocks = re.split(r"(?m)^(?==== step \d+ ===$)", path.read_text()) if path.exists() else []
    earlier = [b for b in blocks if b.strip() and int(b.split()[2]) < step]
    path.write_text("".join([*earlier, f"=== step {step} ===\n{text}\n"]))


def text_of(tokens: Sequence[int]) -> str:
    return tokenizer.decode(np.array(tokens, dtype=np.uint16))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.sample", description="Sample text from a model.")
    parser.add_argument("model", help="a run folder (its newest checkpoint) or a Hugging Face model folder")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; empty: start a document")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(argv)
    try:
        model = load_any(o.model)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if torch.cuda.is_available():
        model.cuda()
    prompt = tokenizer.encode(o.prompt).tolist()
    sys.stdout.write(o.prompt)
    made = generate(model, prompt, o.tokens, o.temperature, o.top_k, o.top_p, o.seed)
    sys.stdout.write(text_of(made) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
