"""What does the model write? Sampling from a run's newest checkpoint or a Hugging Face folder.

python -m training.sample RUN_FOLDER|HF_FOLDER "prompt" [--tokens N] [--temperature X] [--top-k N]
    [--top-p X] [--seed N] [--count N] [--out FILE]
"""

import argparse
import codecs
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage import events, objects, tokenizer
from storage.tokenizer import VOCABULARY_SIZE
from training.config import TEMPERATURE, TOP_K, UNICORN
from training.gpt2 import GPT2
from training.model_config import ModelConfig
from training.models import Model
from training.modern import Modern, norm, rotations
from training.weights import load_any

SAMPLES = "samples.txt"


class Cache:
    """What the model has seen of some rows of text: each block's keys and values, so that a new token costs one."""

    def __init__(self, model: Model) -> None:
        self.model, self.seen = model, 0
        self.read = self._read_modern if isinstance(model, Modern) else self._read_gpt2
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def next_logits(self, text: Tensor) -> Tensor:
        """fp32 logits (B, V), on the CPU, of the token after `text` (B, T); all but its end was seen before.

        Past the context the oldest token falls out and every position moves: there the whole window is read anew.
        """
        wte, context = self.model.wte.weight, self.model.config.context
        if text.shape[1] > context:
            last = self.model.hidden(text[:, -context:].to(wte.device))[:, -1]
        else:
            last = self.read(text[:, self.seen :].to(wte.device))
            self.seen = text.shape[1]
        return self.model.head_logits(last).float().cpu()

    def _read_gpt2(self, tokens: Tensor) -> Tensor:
        """(B, n) -> (B, C), the last position's, after the last LayerNorm."""
        model, start, heads = self.model, self.seen, self.model.config.heads
        assert isinstance(model, GPT2)
        x = model.wte(tokens) + model.wpe.weight[start : start + tokens.shape[1]]
        blocks: list[Any] = list(model.blocks)
        for number, block in enumerate(blocks):
            qkv = block.attn.c_attn(block.ln_1(x))  # (B, n, 3C)
            q, k, v = qkv.view(*tokens.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
            k, v = self._extend(number, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return model.ln_f(x[:, -1])  # type: ignore[no-any-return]

    def _read_modern(self, tokens: Tensor) -> Tensor:
        model, start = self.model, self.seen
        cos, sin = rotations(start + tokens.shape[1], model.config.head_size, tokens.device)
        x = norm(model.wte(tokens))
        blocks: list[Any] = list(model.blocks)
        for number, block in enumerate(blocks):
            q, k, v = (t.transpose(1, 2) for t in block.attn.qkv(norm(x), cos[start:], sin[start:]))
            k, v = self._extend(number, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(norm(x))
        return norm(x[:, -1])

    def _extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if block == len(self.pairs):
            self.pairs.append((k, v))
        else:
            old_k, old_v = self.pairs[block]
            self.pairs[block] = (torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2))
        return self.pairs[block]


@torch.no_grad()
def stream(
    model: Model,
    prompt: Sequence[int],
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: int = 1,
) -> Iterator[list[int]]:
    """Continue `prompt` in several rows: the next token of each, `tokens` times. Drawn on the CPU by `seed`.

    An empty prompt starts a document: with EOT, the last token of the vocabulary. What pads that is never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model)
    text = torch.tensor([list(prompt) or [min(model.config.vocab, VOCABULARY_SIZE) - 1]] * rows)
    for _ in range(tokens):
        drawn = draw(cache.next_logits(text)[:, :VOCABULARY_SIZE], temperature, top_k, top_p, generator)
        text = torch.cat([text, torch.tensor(drawn)[:, None]], dim=1)
        yield drawn


def generate(model: Model, prompt: Sequence[int], tokens: int, **options: Any) -> list[int]:
    """The tokens of one row; options are those of `stream`."""
    return [drawn[0] for drawn in stream(model, prompt, tokens, **options)]


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> list[int]:
    """A token for each row of logits (B, V); a temperature of 0 takes the likeliest, a top_k of 0 leaves all.

    Of the `top_k` likeliest those are kept whose likelier ones have less than `top_p` of the mass.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
    if top_k == 0 and top_p >= 1:
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
    width = logits.shape[-1]
    values, order = logits.topk(min(top_k or width, width))  # the largest first
    probabilities = (values / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p, probabilities, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0].tolist()


def record(run: str, step: int, text: str) -> None:
    """Put the text into the run's samples.txt, in place of any of this step or a later one."""
    path = Path(run, SAMPLES)
    blocks = re.split(r"(?m)^(?==== step \d+ ===$)", path.read_text()) if path.exists() else []
    earlier = [b for b in blocks if b.strip() and int(b.split()[2]) < step]
    path.write_text("".join([*earlier, f"=== step {step} ===\n{text}\n"]))


def text_of(tokens: Sequence[int]) -> str:
    return tokenizer.decode(np.array(tokens, dtype=np.uint16))


def write(model: Model, prompt: str, options: dict[str, Any]) -> None:
    """Write a text to the terminal token by token; a character may need several of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(prompt)
    for (token,) in stream(model, tokenizer.encode(prompt).tolist(), **options):
        sys.stdout.write(decoder.decode(tokenizer.encoding().decode_single_token_bytes(token)))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


def several(model: Model, prompt: str, count: int, options: dict[str, Any]) -> str:
    """Texts in blocks headed by their number."""
    steps = list(stream(model, tokenizer.encode(prompt).tolist(), **options, rows=count))
    texts = [text_of(line) for line in zip(*steps, strict=True)]
    return "".join(f"=== sample {n} ===\n{prompt}{text}\n" for n, text in enumerate(texts, start=1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.sample", description="Sample text from a model.")
    parser.add_argument("model", help="a run folder (its newest checkpoint) or a Hugging Face model folder")
    parser.add_argument("prompt", nargs="?", default=UNICORN, help="text to continue; empty: start a document")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--top-k", type=int, default=TOP_K, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="texts, made together")
    parser.add_argument("--out", help="a file for them, instead of the terminal")
    o = parser.parse_args(argv)
    try:
        check(o)
        model = load_any(o.model)
        check_vocabulary(model.config.vocab, o.model)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        events.refuse(str(error))
        return 2
    if torch.cuda.is_available():
        model.cuda()
    options = {name: getattr(o, name) for name in ("tokens", "temperature", "top_k", "top_p", "seed")}
    if o.out:
        objects.publish_bytes(o.out, several(model, o.prompt, o.count, options).encode())
    elif o.count > 1:
        sys.stdout.write(several(model, o.prompt, o.count, options))
    else:
        write(model, o.prompt, options)
    return 0


def check(o: argparse.Namespace) -> None:
    """Raises ValueError for numbers that mean nothing."""
    for name, low, high in (("tokens", 1, 1e9), ("count", 1, 1e4), ("temperature", 0, 100), ("top_k", 0, 1e9)):
        if not low <= getattr(o, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)} must lie between {low} and {high:g}")
    if not 0 < o.top_p <= 1:
        raise ValueError(f"--top-p {o.top_p} must be above 0 and at most 1")


def check_vocabulary(size: int, source: str) -> None:
    """Raises ValueError for a model whose tokens are not GPT-2's; padding behind those is no matter."""
    padded = ModelConfig(layers=1, channels=1, heads=1).padded_vocab
    if not VOCABULARY_SIZE <= size <= padded:
        raise ValueError(
            f"{source} has a vocabulary of {size:,} tokens, where GPT-2's has {VOCABULARY_SIZE:,} ({padded:,} with its "
            "padding): this model needs its own tokenizer; sample it with transformers' `generate`"
        )


if __name__ == "__main__":
    sys.exit(main())
