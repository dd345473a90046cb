"""Which of four endings does the model find likeliest? HellaSwag, by two protocols, and items in its format.

`completion` is llm.c's (dev/data/hellaswag.py): the raw context, a space and the ending; the sum of the
ending's log-probabilities (acc), and their mean over tokens (acc_norm).
`harness` is lm-eval's `hellaswag`: the activity before the context, markup removed; the sum (acc), and the
sum divided by the ending's length in characters (acc_norm).
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from evals.model import LoadedModel
from evals.results import EvalResult, Score, mean_score
from evals.scoring import Request, Scored, Scorer
from storage import items as stored_items

PROTOCOLS = ("completion", "harness")
Prompt = tuple[str, tuple[str, ...]]  # context, endings
# the last sentence, where it starts in lower case: how ctx_b follows ctx_a ("... on a roof. he")
LOWER_CASE_END = re.compile(r"^(?P<a>.*[.!?\"')\]]) (?P<b>[a-z][^.!?]*)$", re.DOTALL)


@dataclass(frozen=True)
class Item:
    name: str  # "hellaswag item 17": said when it can't be scored
    ind: int
    activity: str
    context: str  # the whole context, as llm.c reads it
    context_a: str
    context_b: str  # the beginning of the sentence that the endings finish; may be empty
    endings: tuple[str, ...]
    label: int


def read_items(url: str, limit: int = 0) -> list[Item]:
    """Items in HellaSwag's raw schema, or in the one without ctx_a and ctx_b.

    Raises ValueError naming the file and the item that is not whole.
    """
    rows = stored_items.read_items(url)
    if not rows:
        raise ValueError(f"{url} holds no items")
    return [item(row, f"{url} item {n}") for n, row in enumerate(rows[: limit or None], start=1)]


def item(row: dict[str, Any], name: str) -> Item:
    if not all(isinstance(ending, str) and harness_text(ending).strip() for ending in row["endings"]):
        raise ValueError(f"{name}: every ending must hold text besides WikiHow's markup, got {row['endings']!r}")
    context = row["ctx"]
    a, b = (row["ctx_a"], row["ctx_b"]) if "ctx_a" in row and "ctx_b" in row else split_context(context)
    return Item(name, int(row["ind"]), row["activity_label"], context, a, b, tuple(row["endings"]), row["label"])


def split_context(context: str) -> tuple[str, str]:
    """ctx_a and ctx_b of a context that came without them."""
    match = LOWER_CASE_END.match(context)
    return (match["a"], match["b"]) if match else (context, "")


def harness_text(text: str) -> str:
    """What lm-eval's hellaswag does to a text: WikiHow's markup is removed."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def prompt(item: Item, protocol: str) -> Prompt:
    """The context and the endings as the model reads them, without the space between."""
    if protocol == "completion":
        return item.context, item.endings
    context = f"{item.activity}: {item.context_a} {item.context_b.capitalize()}"
    return harness_text(context), tuple(harness_text(ending) for ending in item.endings)


def requests(items: Sequence[Item], protocol: str, model: LoadedModel) -> list[Request]:
    """Four requests an item, in order. Raises ValueError for an item whose tokens leave nothing to score."""
    prompts = [prompt(item, protocol) for item in items]
    if protocol == "completion":
        # context and " ending" are encoded apart, as llm.c does
        contexts = model.encode([context for context, _ in prompts])
        endings = model.encode([" " + ending for _, several in prompts for ending in several])
    else:
        contexts = model.encode_prompts([context.rstrip() for context, _ in prompts])
        endings = _harness_endings(prompts, contexts, model)
    made, position = [], 0
    for item, context, (_, several) in zip(items, contexts, prompts, strict=True):
        for number in range(len(several)):
            name = f"{item.name}, ending {number} ({protocol})"
            made.append(Request(name, tuple(context), tuple(endings[position])))
            position += 1
    return made


def _harness_endings(prompts: Sequence[Prompt], contexts: list[list[int]], model: LoadedModel) -> list[list[int]]:
    """lm-eval encodes context and ending in one text, and takes the tokens after the context's."""
    wholes = [(context, f"{context} {ending}") for context, several in prompts for ending in several]
    if model.gpt2_vocabulary:  # its words begin with their space: what follows the context is the same alone
        return model.encode([whole[len(context.rstrip()) :] for context, whole in wholes])
    owners = [n for n, (_, several) in enumerate(prompts) for _ in several]
    encoded = model.encode_prompts([whole for _, whole in wholes])
    return [whole[len(contexts[n]) :] for whole, n in zip(encoded, owners, strict=True)]


def evaluate(
    model: LoadedModel,
    scorer: Scorer,
    items: Sequence[Item],
    suite: str,
    protocols: Sequence[str] = PROTOCOLS,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score every item by every protocol."""
    scores: dict[str, Score] = {}
    per_item: list[dict[str, Any]] = []
    truncated = 0
    with ThreadPoolExecutor(1) as ahead:  # the next protocol's texts become tokens while a GPU scores this one's
        waiting = [ahead.submit(requests, items, protocol, model) for protocol in protocols]
        for number, protocol in enumerate(protocols):
            asked = waiting[number].result()
            total = len(asked)
            assert total == sum(len(item.endings) for item in items)
            report = (lambda d, t, n=number: progress(n * t + d, len(protocols) * t)) if progress else None
            rows = _judge(items, protocol, scorer.score(asked, report))
            truncated += sum(row["truncated"] for row in rows)
            scores[f"{protocol}_acc"] = mean_score([float(row["correct"]) for row in rows])
            scores[f"{protocol}_acc_norm"] = mean_score([float(row["correct_norm"]) for row in rows])
            per_item += rows
    return EvalResult(suite, ", ".join(protocols), model.describe(), scores, len(items), truncated, per_item)


def _judge(items: Sequence[Item], protocol: str, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row an item: log-probabilities, the two choices, and whether they are right."""
    rows, position = [], 0
    for item in items:
        mine = scored[position : position + len(item.endings)]
        position += len(item.endings)
        logprobs = [s.logprob for s in mine]
        normalised = [p / n for p, n in zip(logprobs, _lengths(item, protocol, mine), strict=True)]
        choice, choice_norm = _best(logprobs), _best(normalised)
        rows.append(
            {
                "protocol": protocol,
                "ind": item.ind,
                "label": item.label,
                "choice": choice,
                "choice_norm": choice_norm,
                "correct": choice == item.label,
                "correct_norm": choice_norm == item.label,
                "logprobs": logprobs,
                "tokens": [s.tokens for s in mine],
                "truncated": sum(s.truncated for s in mine),
            }
        )
    return rows


def _lengths(item: Item, protocol: str, scored: Sequence[Scored]) -> list[int]:
    if protocol == "completion":
        return [s.tokens for s in scored]
    return [len(ending) for ending in prompt(item, "harness")[1]]


def _best(values: Sequence[float]) -> int:
    """The first of the largest, as numpy's argmax."""
    return max(range(len(values)), key=lambda i: (values[i], -i))
