"""How do the files of a dataset on the hub get here whole, whatever the connection does?

The file list comes from the hub's tree at one commit, with the size and sha256 of each file. A file is
fetched over HTTP into `<name>.part`, resumed there with a Range request by whichever process comes next,
checked, and only then renamed. (`hf_hub_download` starts from nothing in a new process.)
"""

import http.client
import json
import logging
import os
import random
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from storage import objects

log = logging.getLogger(__name__)

ENDPOINT = "https://huggingface.co"
ATTEMPTS = 8  # of a download in a row that bring no byte; then it fails
LIST_ATTEMPTS = 4  # of a question to the hub: on a machine without a network it fails within seconds
LONGEST_WAIT = 300.0  # seconds between attempts; the hub counts its rate limits over 5 minutes
TIMEOUT = 60.0  # seconds without a byte
FIRST_TIMEOUT = 10.0  # seconds, where nothing depends on an answer yet
CHUNK = 2**20
PARALLEL = 4  # files at once: more brings nothing on one connection, and counts against the rate limit


class Unreachable(ValueError):
    """There is no way to the server, or it does not answer."""


@dataclass(frozen=True)
class Entry:
    """A file of a dataset at one commit."""

    path: str
    bytes: int
    sha256: str  # empty for small files, which are kept in git and have none


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def commit_of(repo: str, revision: str = "main") -> str:
    """The commit that a branch or tag names now. Raises ValueError where there is no such dataset."""
    url = f"{endpoint()}/api/datasets/{repo}/revision/{urllib.parse.quote(revision, safe='')}"
    answer, _ = _ask(url, f"dataset {repo} at {revision}")
    return str(answer["sha"])


def list_tree(repo: str, commit: str, folder: str = "") -> list[Entry]:
    """The files directly in a folder of a dataset, in the order of their names."""
    place = f"/{urllib.parse.quote(folder, safe='')}" if folder else ""
    url: str | None = f"{endpoint()}/api/datasets/{repo}/tree/{commit}{place}?recursive=false&expand=false"
    found: list[dict[str, Any]] = []
    while url:
        page, link = _ask(url, f"folder {folder or '/'} of dataset {repo}")
        found += page
        url = _next_page(link)
    files = [e for e in found if e["type"] == "file"]
    return sorted((_entry(e) for e in files), key=lambda e: e.path)


def _entry(listed: dict[str, Any]) -> Entry:
    lfs = listed.get("lfs") or {}
    return Entry(listed["path"], lfs.get("size", listed["size"]), lfs.get("oid", "").removeprefix("sha256:"))


def size_of(url: str) -> int:
    """Bytes of a file, by one question: on a machine without a network it fails at once, with Unreachable."""
    try:
        with urllib.request.urlopen(_request(url, {}), timeout=FIRST_TIMEOUT) as response:
            return int(response.headers["Content-Length"])
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} can't be fetched: {_explain(error)}") from error
    except OSError as error:
        raise Unreachable(f"{url} is not to be had ({error}): check the network") from error


def _next_page(link: str) -> str | None:
    for part in link.split(","):
        url, _, relation = part.partition(";")
        if 'rel="next"' in relation:
            return url.strip(" <>")
    return None


def fetch(
    repo: str,
    commit: str,
    entries: Sequence[Entry],
    folder: str,
    progress: Callable[[int], None],
    done: Callable[[Entry, str], None] = lambda entry, local: None,
    check: Callable[[Entry, str], None] = lambda entry, part: None,
) -> list[str]:
    """Fetch files into a local folder, several at once; their paths there, in order.

    `progress` gets the bytes that are here, over all files; `done` gets each file once it is whole,
    `check` before it gets its name, to raise ValueError where it is not what it should be.
    Raises ValueError where a file can't be had whole.
    """
    counter = _Counter(progress)

    def one(entry: Entry) -> str:
        local = os.path.join(folder, os.path.basename(entry.path))
        fetch_file(_place(repo, commit, entry), local, entry, counter.of(entry.path), check, counter.stopped)
        done(entry, local)
        return local

    with ThreadPoolExecutor(PARALLEL) as pool:
        try:
            futures = [pool.submit(one, entry) for entry in entries]
            return [future.result() for future in futures]
        finally:
            counter.stopped.set()  # where one has failed, or somebody has pressed Ctrl-C
            pool.shutdown(wait=True, cancel_futures=True)


def fetch_end(repo: str, commit: str, entry: Entry, local: str, count: int, stopped: Event) -> None:
    """Make `local` a file of the entry's size that holds its last `count` bytes; those before are a hole."""
    Path(local).touch()
    os.truncate(local, max(0, entry.bytes - count))
    _fetch_part(_place(repo, commit, entry), Path(local), entry, lambda _: None, stopped)


def _place(repo: str, commit: str, entry: Entry) -> str:
    return f"{endpoint()}/datasets/{repo}/resolve/{commit}/{urllib.parse.quote(entry.path)}"


class _Stopped(Exception):
    """The download ends here for now; its part is kept."""


class _Counter:
    """Bytes of several files, told as one sum."""

    def __init__(self, progress: Callable[[int], None]):
        self.progress, self.lock = progress, Lock()
        self.bytes: dict[str, int] = {}
        self.stopped = Event()

    def of(self, name: str) -> Callable[[int], None]:
        def count(here: int) -> None:
            if self.stopped.is_set():
                raise _Stopped(name)
            with self.lock:
                self.bytes[name] = here
                self.progress(sum(self.bytes.values()))

        return count


def fetch_file(
    url: str,
    local: str,
    entry: Entry,
    progress: Callable[[int], None],
    check: Callable[[Entry, str], None] = lambda entry, part: None,
    stopped: Event | None = None,
) -> None:
    """Make `local` the whole, checked file; what an earlier process has begun is gone on with.

    `stopped` ends it while it waits for the hub.
    """
    there = os.path.exists(local) and os.path.getsize(local) == entry.bytes
    if there and entry.sha256 in ("", objects.sha256(local)):
        progress(entry.bytes)
        return
    part = Path(f"{local}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for again in (True, False):
        _fetch_part(url, part, entry, progress, stopped or Event())
        found = objects.sha256(str(part))
        if not entry.sha256 or found == entry.sha256:
            check(entry, str(part))
            objects.sync(str(part))
            os.replace(part, local)
            return
        part.unlink()
        log.warning("%s came with wrong bytes (sha256 %s)%s", url, found, ": fetching it anew" if again else "")
    raise ValueError(f"{url} twice came with sha256 {found}, not {entry.sha256}: is a proxy changing it?")


def _fetch_part(url: str, part: Path, entry: Entry, progress: Callable[[int], None], stopped: Event) -> None:
    """Append to `part` until it has all bytes, over as many connections as it takes."""
    failures = 0
    while (here := _size(part)) < entry.bytes:
        progress(here)
        reason, wait = _receive(url, part, here, progress)
        failures = 0 if _size(part) > here else failures + 1
        if _size(part) < entry.bytes:
            _pause(url, failures, ATTEMPTS, reason, wait, stopped)
    if here > entry.bytes:
        part.unlink()
        raise ValueError(f"{url} is longer than the {entry.bytes:,} bytes in the hub's list: run this again")
    part.touch()
    progress(entry.bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(url: str, part: Path, here: int, progress: Callable[[int], None]) -> tuple[Exception | str, float | None]:
    """Append what one connection brings; (why it ended, seconds to wait that the hub asked for)."""
    try:
        _append(url, part, here, progress)
    except urllib.error.HTTPError as error:
        if not _is_passing(error.code) and error.code != 416:
            raise ValueError(f"{url} can't be fetched: {_explain(error)}") from error
        if error.code == 416:  # the part does not fit this file
            part.unlink()
        return error, _asked_wait(error)
    except (OSError, http.client.HTTPException) as error:
        return error, None
    return "the connection was cut", None


def _append(url: str, part: Path, here: int, progress: Callable[[int], None]) -> None:
    headers = {"Range": f"bytes={here}-"} if here else {}
    with urllib.request.urlopen(_request(url, headers), timeout=TIMEOUT) as response:
        resumed = response.status == 206
        here = here if resumed else 0
        with open(part, "ab" if resumed else "wb") as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)
                here += len(chunk)
                progress(here)


def _is_passing(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    request = urllib.request.Request(url, headers=headers | {"User-Agent": "gpt2-pipeline"})
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(endpoint()):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the hub, not for its CDN
    return request


def _ask(url: str, what: str) -> tuple[Any, str]:
    """A whole answer of the hub's interface and its Link header, asked for again while the hub is busy or out of reach.

    Raises ValueError where the hub refuses, and Unreachable where no answer comes whole.
    """
    failures = 0
    while True:
        reason: Exception
        wait: float | None = None
        try:
            with urllib.request.urlopen(_request(url, {}), timeout=TIMEOUT) as response:
                return json.load(response), response.headers.get("Link", "")
        except urllib.error.HTTPError as error:
            if not _is_passing(error.code):
                raise ValueError(f"{what} is not to be had from {endpoint()}: {_explain(error)}") from error
            reason, wait = error, _asked_wait(error)
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:  # also in the midst of an answer
            reason = error
        failures += 1
        _pause(url, failures, LIST_ATTEMPTS, reason, wait, Event())


def _explain(error: urllib.error.HTTPError) -> str:
    hint = {
        401: "set HF_TOKEN to a token that may read it",
        403: "accept its terms on the hub and set HF_TOKEN to a token that may read it",
        404: "check its name",
    }.get(error.code, "see the hub's status page")
    return f"HTTP {error.code} ({error.reason}); {hint}"


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the hub asks to wait: Retry-After, or t= in its RateLimit header."""
    fields = f"t={error.headers.get('Retry-After', '')};{error.headers.get('RateLimit', '')}"
    asked = re.search(r"\bt=\s*(\d+)", fields)
    return float(asked[1]) if asked else None


def _pause(url: str, failures: int, most: int, reason: Exception | str, asked: float | None, stopped: Event) -> None:
    """Wait before the next attempt, or raise Unreachable after too many that brought nothing."""
    if failures >= most:
        raise Unreachable(
            f"{url} can't be had after {failures} attempts ({reason}): check the network, or use a corpus "
            "that is already here; what has been fetched is kept"
        )
    wait = min(LONGEST_WAIT, asked if asked is not None else 2.0**failures * random.uniform(0.25, 0.5))
    log.warning("%s: %s; trying again in %.1f s", url, reason, wait)
    if stopped.wait(wait):
        raise _Stopped(url)
