"""How well does the model predict text that it has not seen? Loss on a token shard, and bits per byte."""

import math
from collections.abc import Callable

import numpy as np

from evals.model import LoadedModel
from evals.results import EvalResult, Score, mean_score
from evals.scoring import Request, Scorer
from storage import shards, tokenizer


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    shard: str,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Windows as the trainer's: T tokens predict the T that follow each, no window sees another.

    `limit` is in tokens. The standard error is over windows: tokens of one window are not independent.
    """
    if not model.gpt2_vocabulary:
        raise ValueError(f"{model.name} has another vocabulary than GPT-2's: the tokens of {shard} mean nothing to it")
    asked = windows(shard, model.context, limit)
    scored = scorer.score(asked, progress)
    sizes = token_bytes()
    rows = []
    for number, (request, score) in enumerate(zip(asked, scored, strict=True)):
        size = int(sizes[list(request.continuation)].sum())
        rows.append({"window": number, "tokens": score.tokens, "bytes": size, "logprob": score.logprob})
    scores = {"loss": loss(rows), "bits_per_byte": bits_per_byte(rows), "perplexity": perplexity(rows)}
    details = {"shard": shard, "window": model.context, "tokens": sum(row["tokens"] for row in rows)}
    return EvalResult("validation_loss", "token windows", model.describe(), scores, len(rows), 0, rows, details)


def windows(shard: str, context: int, limit: int = 0) -> list[Request]:
    """The shard cut into windows; the last, shorter one is dropped unless it is the only one."""
    tokens = shards.open_shard(shard)
    count = min(len(tokens), limit + 1) if limit else len(tokens)
    if count < 2:
        raise ValueError(f"{shard} holds {len(tokens)} tokens: at least 2 are needed for a loss")
    width = min(context, count - 1)
    cut = []
    for start in range(0, count - width, width):
        piece = tuple(np.asarray(tokens[start : start + width + 1]).tolist())
        cut.append(Request(f"{shard}, tokens from {start}", piece[:1], piece[1:]))
    return cut


def token_bytes() -> np.ndarray:
    """Bytes of text behind each GPT-2 token (50257,); the end-of-text token stands for none."""
    encoding = tokenizer.encoding()
    sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        if token != tokenizer.EOT:
            sizes[token] = len(encoding.decode_single_token_bytes(token))
    return sizes


def loss(rows: list[dict]) -> Score:
    """Nats a token; every window has the same number of tokens, so the mean of means is the mean."""
    return mean_score([-row["logprob"] / row["tokens"] for row in rows])


def perplexity(rows: list[dict]) -> Score:
    nats = loss(rows)
    value = math.exp(nats.value)
    return Score(value, None if nats.stderr is None else value * nats.stderr, nats.n)


def bits_per_byte(rows: list[dict]) -> Score:
    """Bits over bytes of all windows: a ratio of sums, whose error is the linearised one."""
    bits = [-row["logprob"] / math.log(2) for row in rows]
    sizes = [row["bytes"] for row in rows]
    value = math.fsum(bits) / sum(sizes)
    n = len(rows)
    if n == 1:
        return Score(value, None, n)
    residuals = math.fsum((b - value * s) ** 2 for b, s in zip(bits, sizes, strict=True))
    return Score(value, math.sqrt(n / (n - 1) * residuals) / sum(sizes), n)
