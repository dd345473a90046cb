"""What in a store does nothing refer to, and may go?

Never what a run in the store needs, nor anything written lately: another machine may be at it. What is listed is
looked at once more before it is removed.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage import objects
from storage.contents import FOLDERS, Contents, Entry, contents, key_of_record
from storage.objects import Stat

log = logging.getLogger(__name__)

LEAST_HOURS = 1.0
SHARED = ("corpora", "tokens", "eval_items")  # what is a run's only as long as one refers to it


@dataclass(frozen=True)
class Garbage:
    """Files that go together."""

    what: str
    name: str  # the output, folder or file in the store, or a path in the home
    paths: tuple[str, ...]  # in the store; a record comes first, so that nobody trusts what is half removed
    bytes: int
    upload: str = ""  # of an unfinished upload to S3: its id


def find(
    store: str, home: Path, needed: Collection[str], before: float, top: Collection[str], busy: Collection[str] = ()
) -> list[Garbage]:
    """What may go of a store, and of the home beside it.

    `needed`: keys that runs refer to; what was made into these is needed, too. `before`: in seconds since 1970, what
    was written since stays. `busy`: runs that are at work here; nothing of theirs is listed.
    """
    found = contents(store, top)
    kept = with_parents(found, {*needed, *(key for key in found.records if key.split("/")[0] not in SHARED)})
    unreadable = set(map(key_of_record, found.unreadable))
    if unreadable:
        log.warning(
            "the records of %s can't be read (`gpt2 store verify` says why): their files are kept, and whatever they "
            "may have been made from",
            ", ".join(sorted(unreadable)),
        )
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in found.entries:
        if not _is_ours(entry.path) or entry.key in unreadable or _is_of(entry.path, busy):
            continue
        if reason := _reason(entry, found, kept):
            groups.setdefault(reason, []).append(entry)
    listed = [
        Garbage(what, name, _ordered(entries), sum(e.stat.bytes for e in entries))
        for (what, name), entries in groups.items()
        if max(e.stat.written for e in entries) < before
    ]
    return [*listed, *_uploads(store, before), *_leftovers(home, found, before)]


def with_parents(found: Contents, keys: Iterable[str]) -> set[str]:
    """`keys` and everything that they were made from, by the records."""
    kept: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in kept:
            kept.add(key)
            waiting += [p.key for p in found.records[key].parents] if key in found.records else []
    return kept


def _reason(entry: Entry, found: Contents, kept: set[str]) -> tuple[str, str] | None:
    """(what it is, the name of the group that it goes with), for a file that nothing refers to."""
    folder = entry.path.rpartition("/")[0]
    superseded = entry.key in found.known and entry.key.split("/")[0] in SHARED and entry.key not in kept
    superseded = superseded and not found.unreadable
    match entry.kind:
        case "partial":
            return "unfinished upload", entry.path
        case "torn checkpoint":
            return "torn checkpoint", folder
        case "claim" if entry.key in found.known or not entry.key:
            return "orphan claims", f"{entry.key}/pieces" if entry.key else folder
        case "foreign" if not superseded:
            return "foreign file", entry.path
        case "unfinished" if entry.key not in kept and not _is_weights(entry.key):
            return "unfinished output", entry.key
        case "own" | "claim" if entry.key not in found.known and entry.key not in kept and not _is_weights(entry.key):
            return "unfinished output", entry.key
    return ("superseded output", entry.key) if superseded else None


def _is_ours(path: str) -> bool:
    """Beside the outputs' folders a user may keep anything; ours is only what tests whether a store can be written."""
    return path.split("/")[0] in FOLDERS or path.startswith(".writable-")


def _is_weights(key: str) -> bool:
    """A run's own folder: a training that stopped can go on from it, whenever."""
    return key.startswith("runs/") and key.count("/") == 1


def _is_of(path: str, runs: Collection[str]) -> bool:
    return path.startswith(tuple(f"runs/{run}/" for run in runs))


def _ordered(entries: Sequence[Entry]) -> tuple[str, ...]:
    first = sorted(entries, key=lambda e: (e.kind != "record", not e.path.endswith("/DONE"), e.path))
    return tuple(e.path for e in first)


def _uploads(store: str, before: float) -> list[Garbage]:
    """Parts of uploads to S3 that never became an object; a listing does not show them, a bill does."""
    if objects.is_local(store):
        return []
    listed = objects.unfinished_uploads(store)
    return [
        Garbage("unfinished upload", upload.path, (upload.path,), upload.bytes, upload.modified)
        for upload in listed
        if upload.written < before
    ]


def _leftovers(home: Path, found: Contents, before: float) -> list[Garbage]:
    """Scratch of outputs that are recorded now: pieces of tokens and downloads."""
    places: Mapping[str, str] = {key: f"work/{key}" for key in found.known if key.startswith("tokens/")} | {
        key: f"downloads/{key.split('/')[1] if key.startswith('corpora/') else key}" for key in found.known
    }
    listed = []
    for place in dict.fromkeys(places.values()):
        files = [s for s in objects.list_files(str(home / place)) if s.path != "lock"]
        if files and _newest(files) < before:
            paths = tuple(str(home / place / s.path) for s in files)
            listed.append(Garbage("scratch", str(home / place), paths, sum(s.bytes for s in files)))
    return listed


def _newest(files: Sequence[Stat]) -> float:
    return max(s.written for s in files)


def remove(store: str, garbage: Sequence[Garbage]) -> None:
    for one in garbage:
        if one.upload:
            objects.abort_upload(objects.join(store, one.name), one.upload)
            continue
        for path in one.paths:
            url = path if path.startswith("/") else objects.join(store, path)
            if objects.exists(url):
                objects.remove(url)
        if objects.is_local(store) or one.what == "scratch":
            _remove_empty_folders(store, one)


def _remove_empty_folders(store: str, one: Garbage) -> None:
    """Locally an empty folder stays behind its files; S3 has none."""
    for path in one.paths:
        folder = Path(path if path.startswith("/") else objects.join(store, path)).parent
        while folder.is_dir() and folder != Path(store) and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
