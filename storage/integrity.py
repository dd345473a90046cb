"""Is every file in the store what its record says, and what stands on one that is not?"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage import lineage_rows, objects
from storage.contents import CLAIMS, Contents, contents, failures, key_of_record, why
from storage.records import File, Record, file_url, fingerprint, folder_url, is_as_written, record_url

HASHERS = 8  # files that are read at once; sha256 uses a core each


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    kind: str  # missing, changed, unreadable, foreign, unfinished, record, config
    path: str  # in the store, or absolute where the bytes lie outside
    what: str  # in words
    key: str  # of the output that it belongs to; "" for none
    dependents: tuple[str, ...]  # keys of what was made from that output, directly or not


@dataclass(frozen=True)
class Verified:
    outputs: int
    files: int
    bytes: int
    problems: Sequence[Problem]


def verify(
    store: str,
    top: Collection[str],
    progress: Progress = lambda done, total: None,
    awaited: Collection[str] = (),
) -> Verified:
    """Read every byte of every output in the store; `progress` gets (bytes read, of how many).

    `awaited`: keys of what runs in the store may yet make, or go on with; what is under way has a claim.
    """
    found = contents(store, top)
    files = [(record, f) for record in found.records.values() for f in record.files]
    total, done = sum(f.bytes for _, f in files), 0
    problems = [*_records(store, found), *_configurations(store, found), *_foreign(found, awaited)]
    with ThreadPoolExecutor(HASHERS) as pool:
        for (record, f), wrong in zip(files, pool.map(lambda pair: _check(store, *pair), files), strict=True):
            done += f.bytes
            progress(done, total)
            if wrong:
                problems.append(Problem(wrong[0], _place(record, f), wrong[1], record.key, ()))
    below = dependents(found)
    told = [Problem(p.kind, p.path, p.what, p.key, below(p.key)) for p in problems]
    return Verified(len(found.records), len(files), total, told)


def _check(store: str, record: Record, file: File) -> tuple[str, str] | None:
    try:
        return _compared(file_url(store, record.key, file.path), file)
    except objects.failures() as error:
        return "unreadable", f"can't be read: {error}"


def _compared(url: str, file: File) -> tuple[str, str] | None:
    if not objects.exists(url):
        return "missing", f"is missing; its record says {file.bytes:,} bytes"
    size = objects.stat(url).bytes
    if size != file.bytes:
        return "changed", f"has {size:,} bytes, its record says {file.bytes:,}"
    digest = objects.sha256(url)
    if digest != file.sha256:
        return "changed", f"has sha256 {digest[:12]}…, its record says {file.sha256[:12]}…"
    return None


def _place(record: Record, file: File) -> str:
    """In the store, or in full where the bytes lie outside."""
    return objects.within(folder_url("", record.key).lstrip("/"), file.path)


def _records(store: str, found: Contents) -> Iterator[Problem]:
    """Those that can't be read or were changed: what defines an output gives its fingerprint, all of it the digest."""
    for path, wrong in found.unreadable.items():
        yield Problem("record", path, f"can't be read: {wrong}", key_of_record(path), ())
    for key, record in found.records.items():
        if record.fingerprint != fingerprint(record.asset, record.code_version, record.config, record.parents):
            yield Problem("record", f"{key}: its record", "does not give its own fingerprint: it was changed", key, ())
        elif not is_as_written(objects.read_json(record_url(store, key))):
            yield Problem("record", f"{key}: its record", "does not give its own digest: it was changed", key, ())


def _configurations(store: str, found: Contents) -> Iterator[Problem]:
    """Of runs; without one a run can neither go on nor be asked about."""
    for path in (e.path for e in found.entries if re.fullmatch("runs/[^/]+/config.json", e.path)):
        try:
            lineage_rows.read(store, path)
        except failures() as error:
            yield Problem("config", path, f"can't be read: {why(error)}", path.removesuffix("/config.json"), ())


def _foreign(found: Contents, awaited: Collection[str]) -> Iterator[Problem]:
    """Files that no record mentions and nobody is at work on; those of an output without a record as one."""
    claims = [e.path.split("/")[1:-1] for e in found.entries if e.path.startswith(f"{CLAIMS}/")]
    claimed = {"/".join(["runs", *name[1:]] if name[0] == "training" else name) for name in claims if name}
    unfinished: dict[str, list[str]] = {}
    for entry in found.entries:
        if any(entry.key == key or entry.path.startswith((f"{key}/", f"{key}.")) for key in claimed):
            continue
        if entry.kind == "foreign":
            yield Problem("foreign", entry.path, "is foreign: no record mentions it", entry.key, ())
        elif entry.kind in ("unfinished", "own") and entry.key not in found.known and entry.key not in awaited:
            unfinished.setdefault(entry.key, []).append(entry.path)
    for key, paths in unfinished.items():
        many = f", like {len(paths) - 1:,} more files in it" if len(paths) > 1 else ""
        what = f"is of no output{many}: {key} has no record, and no run in the store is making it or can go on with it"
        yield Problem("unfinished", paths[0], what, key, ())


def dependents(found: Contents) -> Callable[[str], tuple[str, ...]]:
    """A function from a key to those of all that was made from it, by the records."""
    children: dict[str, list[str]] = {}
    for record in found.records.values():
        for parent in record.parents:
            children.setdefault(parent.key, []).append(record.key)

    def below(key: str) -> tuple[str, ...]:
        reached: dict[str, None] = {}
        waiting = list(children.get(key, []))
        while waiting:
            if (one := waiting.pop(0)) not in reached:
                reached[one] = None
                waiting += children.get(one, [])
        return tuple(reached)

    return below
