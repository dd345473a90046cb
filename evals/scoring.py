"""What log-probability does a model give to a continuation after a context, and how is that made fast?

Three things make it fast, and none of them changes a result beyond float rounding:
requests that share a context (the four endings of one item) become one row, in which each continuation sees
the context and itself only; rows are sorted by length, so that little is padding; and the head, the largest
part of a small model, runs on the positions that predict a continuation and on no other.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evals.head import capped, linear_head, product, reduce_by_rows, reduce_in_cache, soft_cap
from evals.model import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One continuation to score."""

    name: str  # said when it cannot be scored
    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token


@dataclass(frozen=True)
class Scored:
    logprob: float  # natural log, summed over the continuation's tokens
    greedy: bool  # every token was the likeliest one
    tokens: int
    truncated: bool  # the context lost tokens on the left to fit the model


@dataclass(frozen=True)
class Branch:
    request: int  # index into the requests
    tokens: tuple[int, ...]  # the continuation


@dataclass(frozen=True)
class Row:
    """A context with one or more continuations: context, then each continuation without its last token."""

    context: tuple[int, ...]
    branches: tuple[Branch, ...]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(b.tokens) - 1 for b in self.branches)


@dataclass(frozen=True)
class Output:
    """What the model said of a batch's continuation tokens, branch after branch, still on its device."""

    branches: list[Branch]
    logprobs: Tensor  # (N,) fp64
    greedy: Tensor  # (N,) bool


class Scorer:
    """Scores requests with one model. `batch_tokens` bounds a padded batch and halves when memory ends."""

    def __init__(self, model: LoadedModel, batch_tokens: int = 0, share_prefixes: bool = True):
        self.model = model
        on_gpu = model.device.type == "cuda"
        # larger batches hold rows less alike in length: at 65,536 the padding of HellaSwag doubles, to 5%
        self.batch_tokens = batch_tokens or (32_768 if on_gpu else 4_096)
        # positions and vocabulary entries of a piece of logits: 2 MB stay in a CPU's cache (half the time of whole
        # rows), a GPU wants large matmuls
        self.piece = (4_096, 65_536) if on_gpu else (512, 1_024)
        self.head, self.cap = linear_head(model), soft_cap(model)
        self.share_prefixes = share_prefixes
        self.honoured = 0  # the longest row in which the model was seen to take a mask of its own

    def score(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Scored]:
        """Scores in the order of the requests. Raises ValueError naming a request that can't be scored."""
        for request in requests:
            _check(request, self.model.context)
        results: dict[int, Scored] = {}
        waiting: list[Output] = []
        rows = _rows(requests, self.model.context, self.share_prefixes)
        if not self._honours_masks(rows):
            rows = _rows(requests, self.model.context, share=False)
        for batch in _batches(rows, lambda: self.batch_tokens):
            outputs = self._score_batch(batch)
            # read one batch late: while a GPU works on this one, the next is packed
            results |= self._read(waiting, requests)
            waiting = outputs
            if progress:
                progress(len(results), len(requests))
        results |= self._read(waiting, requests)
        return [results[n] for n in range(len(requests))]

    def _read(self, outputs: Sequence[Output], requests: Sequence[Request]) -> dict[int, Scored]:
        results = {}
        for branch, logprob, greedy in _by_branch(outputs):
            request = requests[branch.request]
            if not math.isfinite(logprob):
                raise ValueError(f"{request.name} can't be scored: its log-probability is {logprob}")
            truncated = _excess(request, self.model.context) > 0
            results[branch.request] = Scored(logprob, greedy, len(branch.tokens), truncated)
        return results

    def _honours_masks(self, rows: list[Row]) -> bool:
        """Whether continuations score in shared rows as they do alone, tried on the longest; an architecture may
        ignore a mask, or count places in a row where it should count those before a continuation.
        """
        shared = [row for row in rows if len(row.branches) > 1]
        if not shared or shared[0].length <= self.honoured:  # the longest row stands first
            return True
        if shared[0].length > _reach(self.model):
            return False
        furthest = max(shared, key=lambda row: len(row.context) + max(len(b.tokens) for b in row.branches))
        if all(self._scores_alone(row) for row in {shared[0], furthest}):
            self.honoured = shared[0].length
        else:
            self.share_prefixes = False
        return self.share_prefixes

    def _scores_alone(self, row: Row) -> bool:
        """Whether each continuation of a row scores as in a row of its own."""
        alone = sorted((Row(row.context, (branch,)) for branch in row.branches), key=lambda one: -one.length)
        try:
            together = self._logprobs([row])
            apart = [self._logprobs(batch) for batch in _batches(alone, lambda: self.batch_tokens)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.warning("%s takes no mask of its own, so prefixes are not shared: %r", self.model.name, error)
            return False
        tolerance = 1e-4 if self.model.module.dtype == torch.float32 else 0.1  # a token
        if all(abs(together[b] - logprob) <= tolerance * len(b.tokens) for p in apart for b, logprob in p.items()):
            return True
        log.warning("%s does not keep to a mask of its own, so prefixes are not shared", self.model.name)
        return False

    def _logprobs(self, rows: list[Row]) -> dict[Branch, float]:
        return {branch: logprob for branch, logprob, _ in _by_branch(self._score_batch(rows))}

    def _score_batch(self, rows: list[Row]) -> list[Output]:
        try:
            return [self._forward(rows)]
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # outside the except block, so that the failed attempt's tensors are free
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        log.warning("out of memory with %d rows: going on with half of them", len(rows))
        half = len(rows) // 2
        return self._score_batch(rows[:half]) + self._score_batch(rows[half:])

    @torch.inference_mode()
    def _forward(self, rows: list[Row]) -> Output:
        tokens, positions, segments = _pack(rows, self.model.eot, self.model.device)  # (B, T) each
        if all(len(row.branches) == 1 for row in rows):  # padding stands on the right: plain causal attention
            attention = {}
        else:
            mask = _tree_mask(segments, self.model.module.dtype)
            attention = {"attention_mask": mask, "position_ids": positions}
        picks = _picks(_targets(rows), self.piece[0], self.model.device)
        picked = self._run(tokens, attention)[picks.rows, picks.columns]  # (M, C) or (M, V)
        return Output([branch for row in rows for branch in row.branches], *self._token_logprobs(picked, picks))

    def _run(self, tokens: Tensor, attention: dict[str, Tensor]) -> Tensor:
        """The last hidden states (B, T, C); logits (B, T, V) where the head is more than a matrix."""
        with _kernels_for(attention, tokens.device):
            if self.head is None:
                return self.model.module(tokens, use_cache=False, **attention).logits
            return self.model.module.base_model(tokens, use_cache=False, **attention).last_hidden_state

    def _token_logprobs(self, picked: Tensor, picks: "Picks") -> tuple[Tensor, Tensor]:
        """fp64 log-probability (N,) of each target, and whether it was the likeliest token."""
        owners, targets = picks.owners.split(picks.sizes), picks.targets.split(picks.sizes)
        parts = zip(picked.split(self.piece[0]), owners, targets, strict=True)
        reduce = reduce_by_rows if picked.is_cuda else reduce_in_cache
        pairs = [reduce(self._logits(rows), len(rows), owners, wanted) for rows, owners, wanted in parts]
        logprobs = torch.cat([logprob for logprob, _ in pairs])
        greedy = torch.cat([likeliest for _, likeliest in pairs])
        return logprobs[picks.back], greedy[picks.back]

    def _logits(self, rows: Tensor) -> Iterator[Tensor]:
        """fp32 logits (n, V) of the picked positions in pieces of the vocabulary, free to be overwritten."""
        if self.head is None:  # they are logits already
            yield rows.float()
            return
        weights = self.head.weight.split(self.piece[1])
        biases = [None] * len(weights) if self.head.bias is None else self.head.bias.split(self.piece[1])
        for weight, bias in zip(weights, biases, strict=True):
            yield capped(product(rows, weight, bias), self.cap)


def rolling(tokens: Sequence[int], start: int, context: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) pieces that predict each token once, as lm-eval's rolling windows do."""
    line = (start, *tokens)
    for at in range(0, len(tokens), context):
        end = min(at + context, len(tokens))
        first = max(0, end - context)  # the last window is a full one, of which only the new tokens count
        yield line[first : at + 1], line[at + 1 : end + 1]


def _check(request: Request, context: int) -> None:
    if not request.context or not request.continuation:
        empty = "continuation" if request.context else "context"
        raise ValueError(f"{request.name} can't be scored: its {empty} has no tokens")
    if len(request.continuation) > context:
        raise ValueError(
            f"{request.name} can't be scored: its continuation has {len(request.continuation)} tokens, "
            f"more than the model's context of {context}"
        )


def _excess(request: Request, context: int) -> int:
    """Tokens by which a request is too long; its last token is never an input."""
    return max(0, len(request.context) + len(request.continuation) - 1 - context)


def _rows(requests: Sequence[Request], context: int, share: bool) -> list[Row]:
    """Requests gathered by context, the longest row first."""
    shared: dict[tuple[int, ...], list[Branch]] = {}
    rows: list[Row] = []
    for index, request in enumerate(requests):
        branch = Branch(index, request.continuation)
        excess = _excess(request, context)
        if excess or not share:  # cut contexts differ from branch to branch, so they can't be shared
            rows.append(Row(request.context[excess:], (branch,)))
        else:
            shared.setdefault(request.context, []).append(branch)
    for prefix, branches in shared.items():
        rows += [Row(prefix, part) for part in _bounded(prefix, branches, 2 * context)]
    return sorted(rows, key=lambda row: -row.length)


def _bounded(prefix: tuple[int, ...], branches: list[Branch], limit: int) -> Iterator[tuple[Branch, ...]]:
    """Branches in parts whose row stays under `limit` tokens: attention costs the length squared."""
    part: list[Branch] = []
    length = len(prefix)
    for branch in branches:
        if part and length + len(branch.tokens) > limit:
            yield tuple(part)
            part, length = [], len(prefix)
        part.append(branch)
        length += len(branch.tokens)
    yield tuple(part)


def _batches(rows: list[Row], batch_tokens: Callable[[], int]) -> Iterator[list[Row]]:
    """Neighbours in length together, as many as fit with padding into what `batch_tokens` says by then."""
    batch: list[Row] = []
    for row in rows:  # sorted: the first row of a batch is its longest
        if batch and batch[0].length * (len(batch) + 1) > batch_tokens():
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pack(rows: list[Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and segments, each (B, T). Segment 0: context, 1 to n: branches, n + 1: padding."""
    width = max(row.length for row in rows)
    # a row's pieces: the context, then each branch without its last token, which goes on after the context
    pieces = [[row.context, *(branch.tokens[:-1] for branch in row.branches)] for row in rows]
    sizes = np.array([len(piece) for line in pieces for piece in line])
    bases = np.array([0 if not n else len(line[0]) for line in pieces for n in range(len(line))])
    numbers = np.array([n for line in pieces for n in range(len(line))])
    filled = np.arange(width) < np.array([row.length for row in rows])[:, None]
    packed = np.zeros((3, len(rows), width), dtype=np.int64)
    packed[0], packed[2] = pad, np.array([len(line) for line in pieces])[:, None]
    packed[0][filled] = np.fromiter(chain.from_iterable(chain.from_iterable(pieces)), np.int64)
    packed[1][filled] = np.repeat(bases, sizes) + _counted(sizes)
    packed[2][filled] = np.repeat(numbers, sizes)
    tokens, positions, segments = _send(packed, device)
    return tokens, positions, segments


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device; to a GPU without waiting for what it works on, so that the next batch is packed meanwhile."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … within each of consecutive pieces of these sizes."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _kernels_for(attention: dict[str, Tensor], device: torch.device) -> AbstractContextManager[None]:
    """Of the kernels that take a mask on a GPU, cuDNN's builds a plan for each new shape, and every batch has one."""
    if device.type != "cuda" or not attention:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _tree_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T): a token sees what stands before it in the context and in its own branch."""
    size = segments.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    seen = before & ((keys == 0) | (keys == queries))  # (B, T, T)
    aligned = -(-size // 8) * 8  # attention kernels want each row of a mask to begin at a multiple of 8
    mask = torch.zeros(len(seen), size, aligned, dtype=dtype, device=segments.device)[..., :size]
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _targets(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and position, (N,) each, whose output predicts a continuation token, and that token; branch by branch."""
    sizes = np.array([len(branch.tokens) for row in rows for branch in row.branches])
    ends = np.repeat([len(row.context) - 1 for row in rows], [len(row.branches) for row in rows])
    starts = np.concatenate([len(row.context) + _begins(row.branches) for row in rows])
    offset = _counted(sizes)
    positions = np.where(offset == 0, np.repeat(ends, sizes), np.repeat(starts, sizes) + offset - 1)
    owners = np.repeat(np.repeat(np.arange(len(rows)), [len(row.branches) for row in rows]), sizes)
    tokens = chain.from_iterable(branch.tokens for row in rows for branch in row.branches)
    return owners, positions, np.fromiter(tokens, np.int64, len(owners))


def _begins(branches: Sequence[Branch]) -> np.ndarray:
    """Where each branch's inputs begin behind the context."""
    inner = np.array([len(branch.tokens) - 1 for branch in branches])
    return np.cumsum(inner) - inner


@dataclass(frozen=True)
class Picks:
    """Positions whose logits are wanted, each once: the branches of a row share the one after its context."""

    rows: Tensor  # (M,)
    columns: Tensor  # (M,)
    owners: Tensor  # (N,) the position of each target, counted within its chunk of positions; in rising order
    targets: Tensor  # (N,)
    sizes: list[int]  # targets a chunk
    back: Tensor  # (N,) from that order to the branches'


def _picks(targets: tuple[np.ndarray, np.ndarray, np.ndarray], chunk: int, device: torch.device) -> Picks:
    rows, positions, tokens = targets
    width = int(positions.max()) + 1
    places, owners = np.unique(rows * width + positions, return_inverse=True)
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    sizes = np.bincount(owners // chunk, minlength=-(-len(places) // chunk)).tolist()
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Picks(
        _send(places // width, device),
        _send(places % width, device),
        _send(owners % chunk, device),
        _send(tokens[order], device),
        sizes,
        _send(back, device),
    )


def _by_branch(outputs: Sequence[Output]) -> Iterator[tuple[Branch, float, bool]]:
    """Sums over each continuation's tokens; here the device is waited for."""
    for output in outputs:
        sizes = np.array([len(branch.tokens) for branch in output.branches])
        starts = np.cumsum(sizes) - sizes
        sums = np.add.reduceat(output.logprobs.cpu().numpy(), starts)
        greedy = np.logical_and.reduceat(output.greedy.cpu().numpy(), starts)
        yield from zip(output.branches, sums.tolist(), greedy.tolist(), strict=True)


# of a configuration's numbers, those that bound how far back a token sees, such as Mistral's sliding_window,
# GPT-Neo's window_size, Llama 4's attention_chunk_size and DeepSeek's index_topk; not Qwen's max_window_layers
BOUND = re.compile(r"window|chunk|local|block|topk")
NO_BOUND = re.compile(r"layers|experts|feed_forward|dropout")


def _reach(model: LoadedModel) -> float:
    """Tokens that a row may have before some layer sees less than all of it; a mask says nothing to such a layer."""
    config = model.module.config.get_text_config().to_dict()
    bounds = [
        value
        for name, value in config.items()
        if BOUND.search(name) and not NO_BOUND.search(name) and type(value) is int and value > 0
    ]
    return min(bounds, default=math.inf)
