"""How does lm-eval see a model? Its requests tokenized as by its own `hf` model, answered by our scorer."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import StoppingCriteriaList

from evals.model import LoadedModel
from evals.scoring import Request, Scorer, rolling

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
GENERATION_ROWS = 16


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    index: int  # among lm-eval's requests
    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    most: int  # new tokens


class HarnessModel(TemplateLM):
    def __init__(self, model: LoadedModel, scorer: Scorer, progress: Progress | None = None):
        super().__init__()
        self.model, self.scorer, self.progress = model, scorer, progress
        self.generation_rows = GENERATION_ROWS  # halves when memory ends
        self.truncated: Counter[str] = Counter()  # requests that lost context tokens, by task
        self._asked: list[Instance] = []

    @property
    def eot_token_id(self) -> int:
        return self.model.eot

    @property
    def max_length(self) -> int:
        return self.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        encode = self.model.encode if add_special_tokens is False else self.model.encode_prompts
        return encode([string])[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [
            Request(f"{r.task_name} item {r.doc_id}, choice {r.idx}", tuple(context), tuple(continuation))
            for r, (_, context, continuation) in zip(self._asked, requests, strict=True)
        ]
        scored = self.scorer.score(asked, self.progress)
        self.truncated.update(str(r.task_name) for r, s in zip(self._asked, scored, strict=True) if s.truncated)
        return [(s.logprob, s.greedy) for s in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Each text whole: windows of the context's length, each token once, the first after EOT."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            for context, continuation in rolling(self.tok_encode(request.args[0]), self.model.eot, self.model.context):
                asked.append(Request(f"{request.task_name} item {request.doc_id}", context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, scored in zip(owners, self.scorer.score(asked, self.progress), strict=True):
            sums[number] += scored.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text up to a stop sequence; sampling is refused, since its score would not repeat."""
        prompts = sorted((self._prompt(n, r) for n, r in enumerate(requests)), key=lambda p: -len(p.tokens))
        texts: dict[int, str] = {}
        while len(texts) < len(prompts):
            texts |= self._generate(prompts[len(texts) : len(texts) + self.generation_rows])
            if self.progress:
                self.progress(len(texts), len(prompts))
        return [texts[n] for n in range(len(requests))]

    def _generate(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        try:
            return greedy(self.model, prompts)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        # outside the except block, so that the failed attempt's tensors are free
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.generation_rows = len(prompts) // 2
        log.warning("out of memory with %d texts: going on with %d", len(prompts), self.generation_rows)
        return self._generate(prompts[: self.generation_rows])

    def _prompt(self, index: int, request: Instance) -> Prompt:
        text, options = request.args
        if options.get("do_sample") or options.get("temperature", 0.0) > 0.0:
            raise ValueError(f"{request.task_name} wants sampled text ({options}): only greedy text is scored")
        until = options.get("until", [])
        stops = (until,) if isinstance(until, str) else tuple(until)
        most = options.get("max_gen_toks", 256)
        room = self.model.context - most
        if room < 1:
            raise ValueError(
                f"{request.task_name}: max_gen_toks={most} leaves no room for a prompt in this model's context of "
                f"{self.model.context} tokens"
            )
        tokens = self.tok_encode(text) or [self.model.eot]
        self.truncated[str(request.task_name)] += len(tokens) > room
        return Prompt(index, tuple(tokens[-room:]), tuple(s for s in stops if s), most)


@torch.inference_mode()
def greedy(model: LoadedModel, prompts: Sequence[Prompt]) -> dict[int, str]:
    """Texts by request, padded on the left so that all rows grow together; a row stops at its first stop sequence."""
    ids, mask = _left_padded([p.tokens for p in prompts], model)
    width = ids.shape[1]

    def finished(grown: Tensor, scores: Tensor, **_: Any) -> Tensor:
        rows = zip(prompts, grown[:, width:].tolist(), strict=True)
        return torch.tensor([_text(model, prompt, row) is not None for prompt, row in rows], device=model.device)

    generate: Callable[..., Tensor] = model.module.generate  # type: ignore[assignment]
    grown = generate(
        ids, attention_mask=mask, max_new_tokens=max(p.most for p in prompts), do_sample=False, pad_token_id=model.eot,
        eos_token_id=list(model.ends) or None, stopping_criteria=StoppingCriteriaList([finished]),
    )  # fmt: skip
    texts = {p.index: _text(model, p, row) for p, row in zip(prompts, grown[:, width:].tolist(), strict=True)}
    return {index: text for index, text in texts.items() if text is not None}


def _text(model: LoadedModel, prompt: Prompt, line: list[int]) -> str | None:
    """What a row says, if it has come to its end; what stands behind that does not count."""
    end = next((n for n, token in enumerate(line) if token in model.ends), None)
    text = model.decode(line[: prompt.most if end is None else min(end, prompt.most)])
    stops = [text.find(stop) for stop in prompt.stops if stop in text]
    if stops:
        return text[: min(stops)]
    return text if end is not None or len(line) >= prompt.most else None


def _left_padded(lines: Sequence[Sequence[int]], model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Tokens and mask, each (B, T)."""
    width = max(len(line) for line in lines)
    ids = [[model.eot] * (width - len(line)) + list(line) for line in lines]
    mask = [[0] * (width - len(line)) + [1] * len(line) for line in lines]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
