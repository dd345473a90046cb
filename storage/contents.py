"""What is each file in a store there for: which output does it belong to, and does that output's record mention it?"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from storage import objects
from storage.objects import Stat
from storage.records import Record, file_url, from_json

# Top folders of a store. What else lies in a local one may be the home.
CLAIMS = ".claims"  # of whoever is making an output
FOLDERS = ("corpora", "tokens", "eval_items", "weights", "runs", "models", CLAIMS)
LOCK = "lock"  # of whoever trains in a run's folder without the `gpt2` command
RUNS_OWN = ("config.json", "source.json", "inputs.json", "definition.json", LOCK)  # beside a run's record
CARD = "README.md"  # beside a run's exported weights: it is written again with every new score
IN_CHECKPOINT = re.compile(r"(model|optimizer_\d+_of_\d+)\.safetensors|state\.json|DONE")
TOKENS_OWN = ("plan.json", "complete.json")
PARTIAL = re.compile(r"(^|/)(\.[^/]*\.partial|\.writable-[^/]*|[^/]*\.part(ial)?)$")

# What a file raises that is not what it should be: of JSON, of UTF-8, of what it must have
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)

Kind = Literal[
    "record",
    "recorded",  # a record mentions it
    "own",  # the project's, beside the record: configurations, plans, complete checkpoints
    "unfinished",  # of an output that has no record, yet or any more
    "partial",  # of an upload or a download that did not come to its end
    "torn checkpoint",
    "claim",  # and pieces, that machines share while they make token shards
    "foreign",  # in the folder of an output whose record does not mention it, or nowhere
]


@dataclass(frozen=True)
class Entry:
    path: str  # in the store
    stat: Stat
    kind: Kind
    key: str  # of the output whose folder it lies in; "" for none


@dataclass(frozen=True)
class Contents:
    entries: Sequence[Entry]
    records: Mapping[str, Record]  # by key
    unreadable: Mapping[str, str]  # path of a record → what is wrong with it

    @property
    def known(self) -> frozenset[str]:
        """Keys of everything that has a record, readable or not."""
        return frozenset([*self.records, *map(key_of_record, self.unreadable)])


def contents(store: str, top: Collection[str] = FOLDERS) -> Contents:
    """Everything below the top folders of a store, from one listing and its records."""
    listed = [s for s in objects.list_files(store) if s.path.split("/")[0] in top]
    records, unreadable = read_records(store, [s.path for s in listed if s.path.endswith("record.json")])
    mentioned = {_within(store, file_url(store, r.key, f.path)) for r in records.values() for f in r.files}
    known = frozenset([*records, *map(key_of_record, unreadable)])
    done = {s.path.rpartition("/")[0] for s in listed if s.path.endswith("/DONE")}
    entries = []
    for stat in listed:
        key = key_of(stat.path, known)
        entries.append(Entry(stat.path, stat, _kind(stat.path, key, known, mentioned, done), key))
    return Contents(entries, records, unreadable)


def _within(store: str, url: str) -> str:
    """The path in the store of what lies there, such as a corpus that a user keeps in it; of another place none."""
    root = store.rstrip("/") + "/"
    if objects.is_local(url) and not url.startswith(root):  # maybe by another path to the same folder
        return os.path.relpath(os.path.realpath(url), os.path.realpath(store))
    return url.removeprefix(root)


def read_records(store: str, paths: Iterable[str]) -> tuple[dict[str, Record], dict[str, str]]:
    """The records at these paths by key, and of those that can't be read what is wrong."""
    found: dict[str, Record] = {}
    wrong: dict[str, str] = {}
    for path in paths:
        try:
            found[key_of_record(path)] = record_at(store, path)
        except failures() as error:
            wrong[path] = why(error)
    return found, wrong


def record_at(store: str, path: str) -> Record:
    """Raises one of UNREADABLE where there is none that this version reads, or that of another output."""
    record = from_json(path, objects.read_json(objects.join(store, path)))
    if record.key != key_of_record(path):
        raise ValueError(f"it is the record of {record.key}, whose folder was copied or moved")
    return record


def failures() -> tuple[type[Exception], ...]:
    """What the reading of a file raises that is not what it should be, or that can't be had."""
    return (*UNREADABLE, *objects.failures())


def why(error: Exception) -> str:
    """What is wrong with an unreadable file, in words."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def key_of_record(path: str) -> str:
    """The key whose record lies at `path`."""
    return path.removesuffix("/record.json") if path.endswith("/record.json") else path.removesuffix(".record.json")


def key_of(path: str, known: frozenset[str]) -> str:
    """The output that a file of the store belongs to by its place."""
    parts = path.split("/")
    folder = "/".join(parts[:-1])
    if parts[-2:-1] == ["scores"]:
        return f"{folder}/{parts[-1].split('.')[0]}"
    if folder in known:
        return folder
    match parts[0]:
        case "corpora":
            return "/".join(parts[:3]) if len(parts) > 3 else ""
        case "tokens" | "eval_items" | "weights" | "models":
            return "/".join(parts[:2]) if len(parts) > 2 else ""
        case "runs" if len(parts) == 3 or (len(parts) > 3 and parts[2] == "checkpoints"):
            return "/".join(parts[:2])
        case "runs" if len(parts) > 3 and parts[2] in ("export", "report", "samples"):
            return "/".join(parts[:3])
        case "runs":
            return folder if len(parts) > 3 else ""
    return ""


def _kind(path: str, key: str, known: frozenset[str], mentioned: set[str], done: set[str]) -> Kind:
    parts = path.split("/")
    folder, name = "/".join(parts[:-1]), parts[-1]
    if path.endswith("record.json") and key_of_record(path) in known:
        return "record"
    if path in mentioned:
        return "recorded"
    if PARTIAL.search(path):
        return "partial"
    if parts[0] == CLAIMS or (parts[0] == "tokens" and parts[2:3] == ["pieces"]):
        return "claim"
    if parts[0] == "runs" and parts[2:3] == ["checkpoints"]:
        if len(parts) > 4 and "/".join(parts[:4]) not in done:
            return "torn checkpoint"
        return "own" if folder in done and IN_CHECKPOINT.fullmatch(name) else "foreign"
    if (parts[0] == "runs" and parts[2:] == [name] and name in RUNS_OWN) or name == ".staged.json":
        return "own"
    if parts[0] == "runs" and parts[2:] == ["export", CARD]:
        return "own"
    if parts[0] == "tokens" and parts[2:] == [name] and name in TOKENS_OWN:
        return "own"
    return "foreign" if key in known or not key else "unfinished"
