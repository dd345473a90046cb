"""How well does the model predict text that it has not seen? Loss on a token shard, and bits per byte."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from evals.completion_items import held_out_documents
from evals.model import LoadedModel
from evals.results import EvalResult, Score
from evals.scoring import Request, Scorer, rolling
from storage import shards, tokenizer

Row = dict[str, Any]  # window, tokens, bytes, sha256 of what was read, logprob


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    shard: str,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
    window: int = 0,
) -> EvalResult:
    """Windows as the trainer's: T tokens predict the T that follow each, no window sees another.

    `limit` is in tokens; T is `window`, so that models of several contexts can be compared, or the model's context. The
    standard error is over windows: tokens of one window are not independent.
    A model with another vocabulary than GPT-2's reads the shard's documents as text.
    """
    if not model.gpt2_vocabulary:
        return _of_text(model, scorer, shard, limit, progress)
    width = min(window or model.context, model.context)
    asked = windows(shard, width, limit)
    scored = scorer.score(asked, progress)
    sizes = token_bytes()
    rows = []
    for number, (request, score) in enumerate(zip(asked, scored, strict=True)):
        size = int(sizes[list(request.continuation)].sum())
        read = np.array((*request.context, *request.continuation), dtype=np.uint16).tobytes()
        rows.append(_row(number, score.tokens, size, read, score.logprob))
    tokens = len(shards.open_shard(shard)) - 1
    wanted = max(min(limit or tokens, tokens) // width, 1)
    return _result(model, shard, "token windows", rows, width, wanted)


def _of_text(
    model: LoadedModel, scorer: Scorer, shard: str, limit: int, progress: Callable[[int, int], None] | None
) -> EvalResult:
    """The shard's whole documents in the model's own tokens, each from its start: another protocol than windows."""
    rows: list[Row] = []
    asked: list[Request] = []
    owners: list[int] = []
    for name, text in held_out_documents(shard):
        if limit and sum(row["tokens"] for row in rows) >= limit:
            break
        tokens = model.encode([text])[0]
        if not tokens:  # an empty document: there is nothing to predict
            continue
        asked += [Request(name, *piece) for piece in rolling(tokens, model.eot, model.context)]
        owners += [len(rows)] * (len(asked) - len(owners))
        read = text.encode()
        rows.append(_row(len(rows), len(tokens), len(read), read, 0.0))
    if not asked:
        raise ValueError(
            f"{shard} holds no whole document, and {model.name}, whose vocabulary is not GPT-2's, reads documents as "
            "text: use a larger shard"
        )
    for owner, score in zip(owners, scorer.score(asked, progress), strict=True):
        rows[owner]["logprob"] += score.logprob
    return _result(model, shard, "documents", rows, model.context, len({*owners}))


def _row(window: int, tokens: int, size: int, read: bytes, logprob: float) -> Row:
    digest = hashlib.sha256(read).hexdigest()  # tells whether another model read the same
    return {"window": window, "tokens": tokens, "bytes": size, "sha256": digest, "logprob": logprob}


def _result(model: LoadedModel, shard: str, protocol: str, rows: list[Row], width: int, wanted: int) -> EvalResult:
    scores = {"loss": loss(rows), "bits_per_byte": bits_per_byte(rows), "perplexity": perplexity(rows)}
    details = {"shard": shard, "window": width, "tokens": sum(row["tokens"] for row in rows)}
    return EvalResult("validation_loss", protocol, model.describe(), scores, len(rows), 0, rows, details, wanted)


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


def loss(rows: list[Row]) -> Score:
    """Nats a token."""
    return _ratio([-row["logprob"] for row in rows], [row["tokens"] for row in rows])


def perplexity(rows: list[Row]) -> Score:
    nats = loss(rows)
    value = math.exp(nats.value)
    return Score(value, None if nats.stderr is None else value * nats.stderr, nats.n)


def bits_per_byte(rows: list[Row]) -> Score:
    return _ratio([-row["logprob"] / math.log(2) for row in rows], [row["bytes"] for row in rows])


def _ratio(tops: list[float], bottoms: list[int]) -> Score:
    """Sum over sum, with the linearised standard error of a ratio; for equal bottoms that of the mean."""
    value = math.fsum(tops) / sum(bottoms)
    n = len(tops)
    if n == 1:
        return Score(value, None, n)
    residuals = math.fsum((t - value * b) ** 2 for t, b in zip(tops, bottoms, strict=True))
    return Score(value, math.sqrt(n / (n - 1) * residuals) / sum(bottoms), n)
