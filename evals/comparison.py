"""What differs between two runs, in data, code, configuration and environment, that could explain their scores?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested keys with dots between."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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
