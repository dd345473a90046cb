"""What does the index take in from a file of a store: an output's record, a run's configuration, its metrics?"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from storage import objects
from storage.contents import FOLDERS, record_at
from storage.records import Record, record_url

Rows = dict[str, list[tuple[Any, ...]]]  # by table; those under FOLLOWS follow on what is in the index: (bytes of it,)
Taken = tuple[int, str]  # of a run's metrics: how many bytes are in the index, and the last line of them
FOLLOWS = "follows"


def files_of(store: str) -> dict[str, str]:
    """What of a store the index reads: path → modified, from one listing."""
    found = {s.path: s.modified for s in objects.list_files(store)}
    return {path: _stamp(path, found) for path in found if _is_read(path)}


def files_beside(store: str, key: str) -> list[str]:
    """What there is to read of one output."""
    own = record_url("", key).lstrip("/")
    run = [f"{key}/config.json", f"{key}/metrics.jsonl"] if key.startswith("runs/") and key.count("/") == 1 else []
    return [path for path in (own, *run) if objects.exists(objects.join(store, path))]


def _is_read(path: str) -> bool:
    parts = path.split("/")
    if parts[0] not in FOLDERS:
        return False
    return path.endswith("record.json") or (parts[0] == "runs" and parts[2:] in (["config.json"], ["metrics.jsonl"]))


def _stamp(path: str, modified: Mapping[str, str]) -> str:
    """When a file changed; a run's configuration is read together with what its inputs are called."""
    return " ".join(modified.get(one, "") for one in (path, *_beside(path)))


def _beside(path: str) -> list[str]:
    return [path.replace("config.json", "inputs.json")] if path.endswith("config.json") else []


def read(store: str, path: str, taken: Taken = (0, "")) -> Rows:
    """The rows of each table that stand on a file of the store, and that it is taken in.

    Of a run's metrics only those after what is `taken`, where the file still has that as it was.
    Raises FileNotFoundError where it is gone, one of contents.UNREADABLE where it is not what it should be.
    """
    folder = path.rpartition("/")[0]
    there = [p for p in (path, *_beside(path)) if p == path or objects.exists(objects.join(store, p))]
    # when they changed is asked before they are read: a change in between is seen by the next that asks
    stamp = _stamp(path, {p: objects.stat(objects.join(store, p)).modified for p in there})
    if path.endswith("record.json"):
        record = record_at(store, path)
        rows, dataset = _of_record(store, record), record.key
    elif path.endswith("metrics.jsonl"):
        return _of_metrics(store, folder, path, stamp, taken)
    else:
        config, inputs = [*(objects.read_json(objects.join(store, p)) for p in there), {}][:2]
        rows, dataset = {"runs": [_run(store, folder, config, inputs)]}, folder
    return rows | {"ingested": [(store, dataset, path, stamp, None, None)]}


def stands_on(path: str) -> dict[str, str]:
    """The tables that have rows from a file of this name, each with the condition for those of dataset $2."""
    if path.endswith("metrics.jsonl"):
        return {"metrics": "dataset = $2 AND step IS NOT NULL"}
    if path.endswith("config.json"):
        return {"runs": "'runs/' || run = $2"}
    tables = ("files", "scores", "checks", "costs", "environments")
    own = {"artifacts": "name = $2", "edges": "output = $2", "metrics": "dataset = $2 AND step IS NULL"}
    return own | dict.fromkeys(tables, "dataset = $2")


def _of_record(store: str, record: Record) -> Rows:
    key, run = record.key, _run_of(record.key)
    numbers, scores = _flatten(record.metrics)
    suite = record.asset if "/scores/" in key else objects.name_of(key)
    return {
        "artifacts": [_artifact(store, record)],
        "files": [(store, key, f.path, f.bytes, f.modified, f.sha256) for f in record.files],
        "edges": [(store, key, p.key, p.fingerprint) for p in record.parents],
        "metrics": [(store, key, name, value, None) for name, value in numbers],
        "scores": [(store, key, run, suite, name, *score, _model_of(key)) for name, score in scores],
        "checks": [(store, key, name, *_outcome(found)) for name, found in record.checks.items()],
        "costs": [(store, key, *(_cost(record, name) for name in COSTS))],
        "environments": [_environment(store, record)],
    }


def _outcome(found: Mapping[str, Any]) -> tuple[bool, str]:
    return found["passed"], json.dumps({name: value for name, value in found.items() if name != "passed"})


COSTS = ("seconds", "gpu_hours", "dollars", "joules", "goodput", "restarts", "rewinds", "skipped_updates")


def _cost(record: Record, name: str) -> float | None:
    """Records of before had 0 dollars where no price was told, which says nothing of what it cost."""
    return (record.cost.get(name) or None) if name == "dollars" else record.cost.get(name)


def _artifact(store: str, record: Record) -> tuple[Any, ...]:
    return (
        *(store, record.key, record.asset, record.fingerprint, record.code_version, _run_of(record.key)),
        *(json.dumps(record.config), _time(record.started), _time(record.ended)),
        *(record.rows, record.tokens, record.bytes, len(record.files), json.dumps(record.metrics)),
    )


def _time(text: str) -> str:
    """Raises ValueError for what is none, which would stop the rows of all other files, too."""
    return datetime.fromisoformat(text).isoformat()


def _environment(store: str, record: Record) -> tuple[Any, ...]:
    versions, hardware = json.dumps(record.versions), json.dumps(record.hardware)
    return store, record.key, record.commit, record.dirty, record.versions.get("python"), versions, hardware


def _run_of(key: str) -> str | None:
    """The run that an output belongs to; corpora, tokens and items are shared by runs."""
    return key.split("/")[1] if key.startswith("runs/") else None


def _model_of(key: str) -> str | None:
    """What a score is of: a run, or the model of models/<name>-<digits>."""
    parts = key.split("/")
    return parts[1].rpartition("-")[0] if parts[0] == "models" else _run_of(key)


def _run(store: str, folder: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A run as it is configured, whatever of it is made yet."""
    train = config["train"]
    return (
        *(store, objects.name_of(folder), str(config["recipe"]), str(config["corpus"])),
        *(int(train["steps"]), int(train["batch_tokens"])),
        *(inputs.get("documents"), inputs.get("tokens"), json.dumps(config)),
    )


def _of_metrics(store: str, folder: str, path: str, stamp: str, taken: Taken) -> Rows:
    start, lines = _appended(objects.join(store, path), *taken)
    size, last = start + len(lines), lines[lines[:-1].rfind(b"\n") + 1 :].decode() or (taken[1] if start else "")
    rows: Rows = {FOLLOWS: [(start,)]} if start else {}
    rows["metrics"] = list(_of_steps(store, folder, lines))
    return rows | {"ingested": [(store, folder, path, stamp, size, last)]}


def _appended(url: str, size: int, last: str) -> tuple[int, bytes]:
    """Where the lines begin that are new, and these lines; all of them, where the file is another than it was.

    One that was cut back, as a run's is on resume, and grew again has another line there: its seconds differ.
    """
    mark = last.encode()
    if mark and (found := objects.read_bytes(url, size - len(mark))).startswith(mark):
        return size, _whole(found[len(mark) :])
    return 0, _whole(objects.read_bytes(url))


def _whole(lines: bytes) -> bytes:
    """Without the last one, where it is still being written."""
    return lines[: lines.rfind(b"\n") + 1]


def _of_steps(store: str, folder: str, lines: bytes) -> Iterator[tuple[Any, ...]]:
    for line in lines.splitlines():
        values = json.loads(line)
        step = int(values.pop("step"))
        for name, value in _flatten(values)[0]:
            yield store, folder, name, value, step


def _score(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    score = found["value"], found.get("stderr"), found.get("n")
    if not all(isinstance(number, int | float | None) for number in score):
        raise ValueError(f"the score {name} is {found}, where numbers should stand")
    return score


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> tuple[list[Any], list[Any]]:
    """Numbers by their dotted name, and scores: entries of {value, stderr, n}."""
    numbers: list[Any] = []
    scores: list[Any] = []
    for name, value in metrics.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping) and isinstance(value.get("value"), int | float):
            short = full.removeprefix("scores.")
            scores.append((short, _score(full, value)))
        elif isinstance(value, Mapping):
            inner = _flatten(value, f"{full}.")
            numbers, scores = numbers + inner[0], scores + inner[1]
        elif isinstance(value, int | float):
            numbers.append((full, float(value)))
    return numbers, scores
