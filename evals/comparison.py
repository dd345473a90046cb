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


Rows = Sequence[Mapping[str, Any]]  # a score's per-item rows


@dataclass(frozen=True)
class Paired:
    """Left less right over the items that both scored: what they share, such as an item's hardness, cancels out."""

    difference: float
    stderr: float
    n: int


def paired(left: Rows, right: Rows) -> dict[str, Paired]:
    """By score name. Empty where the rows are not of the same items."""
    ours, theirs = _values(left), _values(right)
    return {
        name: _difference([ours[name][key] - theirs[name][key] for key in ours[name]])
        for name in ours
        if len(ours[name]) > 1 and ours[name].keys() == theirs.get(name, {}).keys()
    }


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
        yield "loss", (row["window"], row["tokens"]), -row["logprob"] / share["tokens"]
        yield "bits_per_byte", (row["window"], row["bytes"]), -row["logprob"] / math.log(2) / share["bytes"]
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
