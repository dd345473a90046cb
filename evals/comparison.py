"""How do two runs compare on the same items, and what differs between them that could explain it?"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from evals.results import mean_score
from storage.records import flatten

Area = Literal["data", "code", "configuration", "environment"]
DATA_ASSETS = ("documents", "token_shards", "eval_items")


class Run(Protocol):
    """A run as plain data; evals.report.ReportData is one."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def records(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Difference:
    area: Area
    key: str
    left: str
    right: str


def differences(left: Run, right: Run) -> list[Difference]:
    """Data by fingerprint, code by version and commit, every key of the configuration, versions and hardware."""
    pairs: list[tuple[Area, Mapping[str, Any], Mapping[str, Any]]] = [
        ("data", _data(left.records), _data(right.records)),
        ("code", _code(left.records), _code(right.records)),
        ("configuration", dict(flatten(left.config)), dict(flatten(right.config))),
        ("environment", _environment(left.records), _environment(right.records)),
    ]
    return [
        Difference(area, key, str(one.get(key, "none")), str(other.get(key, "none")))
        for area, one, other in pairs
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _data(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Asset -> key and fingerprint; of several eval_items, each by its key's last part."""
    found = {}
    for record in records:
        if record["asset"] in DATA_ASSETS:
            name = record["asset"]
            name += f" {record['key'].rsplit('/', 1)[-1].split('-')[0]}" if name == "eval_items" else ""
            found[name] = f"{record['key']} ({record['fingerprint'][:12]})"
    return found


def _code(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for record in records:
        if record.get("code_version") is not None:
            found[f"{record['asset']} code version"] = str(record["code_version"])
        if record["asset"] == "trained_model" and record.get("commit"):
            found["commit"] = record["commit"][:12] + (" with local changes" if record.get("dirty") else "")
    return found


def _environment(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the training; evals on another machine give the same scores within float rounding."""
    for record in records:
        if record["asset"] == "trained_model":
            return dict(record.get("hardware") or {}) | dict(record.get("versions") or {})
    return {}


Page = Mapping[str, Any]  # a score's JSON
Rows = Sequence[Mapping[str, Any]]  # its per-item rows


@dataclass(frozen=True)
class Paired:
    """Left less right over the items that both scored: what they share, such as an item's hardness, cancels out."""

    difference: float
    stderr: float
    n: int


def paired(left: Page, right: Page, rows: Rows, others: Rows) -> dict[str, Paired | None]:
    """By score name: every score that is the mean of its rows, and what follows from such means alone.

    None where the rows are known not to be of the same items.
    """
    ours, theirs = _means(left, rows), _means(right, others)
    pairs = {name: _pair(ours[name], theirs[name]) for name in ours if name in theirs and len(ours[name]) > 1}
    if left.get("suite") == "core":
        return _of_core(left, right, pairs)
    if "loss" in pairs and "perplexity" in left["scores"] and "perplexity" in right["scores"]:
        pairs["perplexity"] = _of_perplexity(pairs["loss"], *(page["scores"] for page in (left, right)))
    return pairs


def _means(page: Page, rows: Rows) -> dict[str, dict[Any, float]]:
    """The scores that are the mean of their rows; of lm-eval's perplexities the rows are log-likelihoods."""
    return {
        name: values
        for name, values in _values(rows).items()
        if name in page["scores"]
        and math.isclose(mean_score(list(values.values())).value, page["scores"][name]["value"], rel_tol=1e-6)
    }


def _pair(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Paired | None:
    return _difference([ours[item] - theirs[item] for item in ours]) if ours.keys() == theirs.keys() else None


def _of_perplexity(loss: Paired | None, ours: Page, theirs: Page) -> Paired | None:
    """As many standard errors apart as the losses whose exponentials they are."""
    if loss is None:
        return None
    apart = ours["perplexity"]["value"] - theirs["perplexity"]["value"]
    slope = apart / loss.difference if loss.difference else ours["perplexity"]["value"]
    return Paired(apart, loss.stderr * slope, loss.n)


def _of_core(left: Page, right: Page, tasks: Mapping[str, Paired | None]) -> dict[str, Paired | None]:
    """The accuracies of its tasks, centred as these are, and their mean. Items of two bundles are not the same."""
    asked, others = (page["details"] for page in (left, right))
    if asked["bundle_sha256"] != others["bundle_sha256"]:
        return dict.fromkeys(left["scores"], None)
    pairs = {f"{task}/centred": _scaled(pair, asked["tasks"][task]["chance"]) for task, pair in tasks.items()}
    if len(pairs) == len(asked["tasks"]):
        pairs["core" if asked["complete"] else "partial_core"] = _mean(list(pairs.values()))
    return {**tasks, **pairs}


def _mean(pairs: Sequence[Paired | None]) -> Paired | None:
    """Over tasks, which are independent of each other."""
    known = [pair for pair in pairs if pair]
    if len(known) < len(pairs):
        return None
    stderr = math.sqrt(math.fsum(pair.stderr**2 for pair in known)) / len(known)
    return Paired(math.fsum(pair.difference for pair in known) / len(known), stderr, sum(pair.n for pair in known))


def _scaled(pair: Paired | None, chance: float) -> Paired | None:
    return Paired(pair.difference / (1 - chance), pair.stderr / (1 - chance), pair.n) if pair else None


def _difference(values: list[float]) -> Paired:
    score = mean_score(values)
    return Paired(score.value, score.stderr or 0.0, score.n)


def _values(rows: Rows) -> dict[str, dict[Any, float]]:
    """Score name -> item -> its value, whose mean over items is the score."""
    found: dict[str, dict[Any, float]] = {}
    share = _shares(rows)
    for row in rows:
        for name, item, value in _values_of(row, share):
            found.setdefault(name, {})[item] = value
    return found


def _shares(rows: Rows) -> dict[str, float]:
    """Mean bytes and tokens of a window: a ratio of sums is the mean of tops over the mean of bottoms."""
    windows = [row for row in rows if "window" in row]
    return {key: math.fsum(row[key] for row in windows) / len(windows) for key in ("bytes", "tokens") if windows}


def _values_of(row: Mapping[str, Any], share: Mapping[str, float]) -> Iterable[tuple[str, Any, float]]:
    if "window" in row:  # validation loss
        text = (row["window"], row["bytes"], row.get("sha256"))
        yield "loss", (*text, row["tokens"]), -row["logprob"] / share["tokens"]
        yield "bits_per_byte", text, -row["logprob"] / math.log(2) / share["bytes"]
    elif "protocol" in row:  # HellaSwag and items in its format
        item = (row["ind"], row.get("label"))  # items made from another corpus have the same numbers, not answers
        yield f"{row['protocol']}_acc", item, float(row["correct"])
        yield f"{row['protocol']}_acc_norm", item, float(row["correct_norm"])
    elif "metrics" in row:  # lm-eval
        for metric, value in json.loads(row["metrics"]).items():
            name = f"{row['task']}/{metric}" + ("" if row["filter"] == "none" else f",{row['filter']}")
            yield name, (row["item"], row.get("target")), float(value)
    else:  # CORE
        yield row["task"], row["item"], float(row["correct"])
