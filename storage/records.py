"""What was made, from what, by which code, where and at what cost: the JSON record beside each output.

An output is named by its key, its path in the store ("tokens/embedded-3.11.7", "runs/demo/scores/eleuther").
What defines it (asset, code version, configuration, parents' fingerprints) makes its fingerprint; where and
when it was made does not. The same fingerprint means the same content, so it is reused and not made again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from storage import objects

SCHEMA = 1
ASKED_AT_ONCE = 8  # files of an output: on S3 each question travels, and large ones have hundreds
LIBRARIES = ("torch", "dagster", "numpy", "pyarrow", "tiktoken", "duckdb", "transformers", "lm_eval")


@dataclass(frozen=True)
class File:
    path: str  # relative to the output's folder, or absolute where the bytes stay outside the store
    bytes: int
    modified: str  # as in objects.Stat
    sha256: str


@dataclass(frozen=True)
class Parent:
    key: str
    fingerprint: str


@dataclass(frozen=True)
class Record:
    asset: str
    key: str
    fingerprint: str
    code_version: str
    config: dict[str, Any]
    parents: list[Parent]
    files: list[File]
    started: str  # ISO 8601, UTC
    ended: str
    rows: int | None = None
    tokens: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)  # seconds, gpu_hours, dollars, joules; of training more
    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → passed, and the numbers it looked at
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


def fingerprint(asset: str, code_version: str, config: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    """The sha256, in hex, of everything that defines an output."""
    definition = {
        "asset": asset,
        "code_version": code_version,
        "config": config,
        "parents": sorted(p.fingerprint for p in parents),
    }
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def record_url(store: str, key: str) -> str:
    """Where the record of `key` lies: in its folder, or beside it for the scores, which share one."""
    if key.split("/")[-2:-1] == ["scores"]:
        return objects.join(store, f"{key}.record.json")
    return objects.join(store, key, "record.json")


def folder_url(store: str, key: str) -> str:
    """The folder that holds the files of `key`."""
    if key.split("/")[-2:-1] == ["scores"]:
        return objects.join(store, key.rsplit("/", 1)[0])
    return objects.join(store, key)


def output_url(store: str, key: str) -> str:
    """What a person opens to see the output: its folder, or the file of a score."""
    return objects.join(store, f"{key}.json" if folder_url(store, key) != objects.join(store, key) else key)


def file_url(store: str, key: str, path: str) -> str:
    """Where a file of `key` lies; absolute paths stay as they are."""
    return objects.within(folder_url(store, key), path)


def read_record(store: str, key: str) -> Record | None:
    """None where there is no record, or another output's, whose folder was copied: it says nothing of this one."""
    url = record_url(store, key)
    record = from_json(url, objects.read_json(url)) if objects.exists(url) else None
    return record if record and record.key == key else None


def from_json(url: str, data: dict[str, Any]) -> Record:
    """Raises ValueError for a record of another schema, or with a value that is not of its kind."""
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"{url} has schema {data.get('schema')!r}, this version reads {SCHEMA}: "
            "use the version of the project that wrote it, or move the output away to make it anew"
        )
    values = _of_kind(url, Record, data)
    for name, kind in (("parents", Parent), ("files", File)):
        values[name] = [kind(**_of_kind(f"{url}: {name}", kind, value)) for value in data[name]]
    for name, value in values.get("cost", {}).items():
        _check_kind(f"{url}: cost", name, value, int | float | None)
    for name, value in values.get("checks", {}).items():
        _check_kind(f"{url}: checks", name, value, dict)
        _check_kind(f"{url}: checks: {name}", "passed", value.get("passed"), bool)
    return Record(**values)


def _of_kind(where: str, kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """What `data` has of a dataclass's fields, each of the kind that it is declared to be."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {data!r} should be an object")
    values = {f.name: data[f.name] for f in dataclasses.fields(kind) if f.name in data}
    for f in dataclasses.fields(kind):
        if f.name in values:
            _check_kind(where, f.name, values[f.name], f.type)
    return values


def _check_kind(where: str, name: str, value: Any, declared: Any) -> None:
    kind = get_origin(declared) if get_origin(declared) in (dict, list) else declared
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name} is {value!r}, which should be {getattr(kind, '__name__', kind)}")


def write_record(store: str, record: Record) -> None:
    data = dataclasses.asdict(record)
    data = {"schema": data.pop("schema"), "bytes": record.bytes, **data}
    objects.publish_json(record_url(store, record.key), data | {"digest": _digest(data)})


def is_as_written(data: Mapping[str, Any]) -> bool:
    """Whether a record's JSON is what `write_record` made it; those of older versions do not tell."""
    return data.get("digest", _digest(data)) == _digest(data)


def _digest(data: Mapping[str, Any]) -> str:
    """The sha256 of a record's JSON without its digest."""
    written = json.loads(json.dumps({name: value for name, value in data.items() if name != "digest"}))
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def describe_file(folder: str, path: str) -> File:
    """A file of an output as its record states it, hashed."""
    url = objects.within(folder, path)
    found = objects.stat(url)
    return File(path, found.bytes, found.modified, objects.sha256(url))


def changes(record: Record, code_version: str, config: Mapping[str, Any], parents: Sequence[Parent]) -> list[str]:
    """What defines an output otherwise now than when it was made: its code's version, settings by name, inputs."""
    found = []
    if record.code_version != code_version:
        found.append(f"code version {record.code_version} → {code_version}")
    then, now = dict(flatten(record.config)), dict(flatten(config))
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            found.append(f"{name} {_brief(then, name)} → {_brief(now, name)}")
    were, are = {p.key: p.fingerprint for p in record.parents}, {p.key: p.fingerprint for p in parents}
    for key in dict.fromkeys([*were, *are]):
        if were.get(key) != are.get(key):
            found.append(f"{key} {were.get(key, 'none')[:8]} → {are.get(key, 'none')[:8]}")
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys with dots between."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _brief(values: Mapping[str, Any], name: str) -> str:
    """A setting as a line can show it: a list of files by their number and a digest."""
    if name not in values:
        return "none"
    value = values[name]
    if isinstance(value, list):
        return f"{len(value)} of digest {hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]}"
    return str(value)


def reusable(
    store: str, key: str, code_version: str, config: Mapping[str, Any], parents: Sequence[Parent], wanted: str
) -> tuple[Record | None, str]:
    """The record of `key` if its output is whole and has the fingerprint `wanted`, and the reason either way."""
    record = read_record(store, key)
    if record is None:
        return None, "not made yet"
    if record.fingerprint != wanted:
        return None, "; ".join(changes(record, code_version, config, parents)) or "made by another asset"
    if problem := first_problem(store, key, record.files):
        return None, problem
    return record, f"same fingerprint {wanted[:8]}, {len(record.files)} files unchanged"


def first_problem(store: str, key: str, files: Sequence[File]) -> str | None:
    """What is wrong with the first of an output's files that is not as its record says, or None."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for problem in pool.map(lambda f: file_problem(store, key, f), files):
            if problem:
                pool.shutdown(cancel_futures=True)
                return problem
    return None


def file_problem(store: str, key: str, file: File) -> str | None:
    """What is wrong with a file of an output, or None."""
    url = file_url(store, key, file.path)
    try:
        found = objects.stat(url)
    except (FileNotFoundError, NotADirectoryError):
        return f"{url} is missing"
    if found.bytes != file.bytes:
        return f"{url} has {found.bytes} bytes, its record says {file.bytes}"
    if not is_unchanged(url, file, found):
        return f"{url} has other content than its record says"
    return None


def is_unchanged(url: str, file: File, found: objects.Stat) -> bool:
    """Whether a file is as it was described. Its hash is read only where its time changed."""
    return found.bytes == file.bytes and (found.modified == file.modified or objects.sha256(url) == file.sha256)


@cache
def code_state() -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) of this project's checkout; (None, None) outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    return commit or None, bool(_git(root, "status", "--porcelain"))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def library_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Of Python, and of those of the libraries that are installed."""
    installed = {d.metadata["Name"].replace("-", "_").lower() for d in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in names if name in installed}
    return {"python": platform.python_version(), **found}


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and the names of the GPUs that nvidia-smi lists."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "memory": memory, "gpus": _gpus()}


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []
