"""Where do a corpus's documents come from?

Every source gives the same thing, parquet files with a `text` column in a fixed order, whether the
documents lie in a folder, on S3 or in Python itself. A source's identity is what defines its documents; its
name, safe in a path, tells two corpora apart.
"""

import difflib
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from storage import embedded, hub, objects, parquet, shards
from storage.library_source import LibrarySource
from storage.records import File, describe_file

log = logging.getLogger(__name__)

HASHED_AT_ONCE = 8  # files: on S3 one connection is slower than a disk

Progress = Callable[[int, int], None]


class Source(Protocol):
    """One corpus. `fetch` makes its files available and lists them in corpus order.

    `kind` says what these are: documents (parquet) or tokens (shards). Downloads in progress go to the local
    folder `scratch`, by default beside the files. `details` tell where it came from but do not define it.
    """

    @property
    def kind(self) -> str: ...
    @property
    def details(self) -> dict[str, Any]: ...
    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def fetch(self, out: str, progress: Progress, scratch: str = "") -> list[File]: ...


def resolve(corpus: str) -> Source:
    """The source that `corpus` names.

    "embedded"; a folder of parquet files, local or s3://; on the hub "fineweb-edu-10B", "-100B", "-350B",
    "fineweb-edu:CC-MAIN-2024-10" (one crawl), "fineweb-edu-100B-tokens" (already tokenized), or
    "hf://datasets/OWNER/NAME/FOLDER" of parquet files; or "datasets:NAME:CONFIG:SPLIT", whatever the datasets
    library loads. Those on the hub take a revision ("fineweb-edu-10B@1a2b3c") and a
    number of files ("fineweb-edu-10B:2", the first two).
    Raises ValueError where there is no such thing, naming the value and the fix.
    """
    if corpus == "embedded":
        return Embedded()
    if place := hub_place(corpus):
        return Hub.at(place)
    if corpus.startswith("datasets:"):
        return LibrarySource.at(corpus)
    if not objects.is_local(corpus) or os.path.isdir(corpus):
        return Folder.at(corpus)
    raise ValueError(f"no corpus {corpus!r}: {_suggestion(corpus)}")


def found_before(corpus: str, identity: dict[str, Any], revision: str | None) -> Source | None:
    """The source that `corpus` named when its identity was found at a commit of the hub, which is not asked again.

    None where that is no such thing: what a folder holds is looked at each time.
    """
    source: Source | None = None
    if revision and "files" in identity and (place := hub_place(corpus)):
        source = Hub.of(place, revision, identity["files"])
    elif corpus.startswith("datasets:") and "name" in identity:
        source = LibrarySource.at(corpus, identity["revision"])
    return source if source and source.identity == identity else None


def _suggestion(corpus: str) -> str:
    if os.path.sep in corpus:
        return "there is no such folder; name a folder of parquet files, an s3:// URL, or embedded"
    folders = [entry.name for entry in os.scandir(".") if entry.is_dir()]
    known = ["embedded", *HUB_FOLDERS, "fineweb-edu:CC-MAIN-2024-10"]
    close = difflib.get_close_matches(corpus, [*known, *folders], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}A corpus is {', '.join(known)}, a folder of parquet files, or an s3:// URL"


class Embedded:
    """The English that every Python carries; its version is the corpus's revision."""

    kind = "documents"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}
        self.name = f"embedded-{embedded.revision()}"
        self.identity = {"kind": "embedded", "revision": embedded.revision(), "edition": embedded.EDITION}

    def fetch(self, out: str, progress: Progress, scratch: str = "") -> list[File]:
        url = objects.join(out, "000_00000.parquet")
        with tempfile.TemporaryDirectory() as scratch:
            local = os.path.join(scratch, "documents.parquet")
            embedded.write_parquet(local)
            objects.publish_file(local, url)
        file = describe_file(out, "000_00000.parquet")
        progress(file.bytes, file.bytes)
        return [file]


@dataclass(frozen=True)
class Folder:
    """Parquet files that stay where they are, local or on S3, in the order of their names."""

    url: str
    name: str
    identity: dict[str, Any]
    details: dict[str, Any]
    kind: str = "documents"

    @classmethod
    def at(cls, url: str) -> "Folder":
        url = os.path.abspath(url) if objects.is_local(url) else url.rstrip("/")
        found = objects.list_files(url, ".parquet")
        if not found:
            raise ValueError(f"{url} holds no .parquet file: name a folder that does, or put documents there")
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(lambda stat: parquet.check_file(objects.join(url, stat.path)), found))
        files = [
            {"path": stat.path, "bytes": stat.bytes, "footer_sha256": footer}
            for stat, footer in zip(found, footers, strict=True)
        ]
        name = f"{objects.safe_name(objects.name_of(url))}-{_digest(files)}"
        return cls(url, name, {"kind": "parquet", "files": files}, {"url": url})

    def fetch(self, out: str, progress: Progress, scratch: str = "") -> list[File]:
        total = sum(f["bytes"] for f in self.identity["files"])
        urls = [objects.join(self.url, f["path"]) for f in self.identity["files"]]
        files: list[File] = []
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            for file in pool.map(lambda url: describe_file(out, url), urls):
                files.append(file)
                progress(sum(f.bytes for f in files), total)
        return files


FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
HUB_FOLDERS = {  # name → (dataset, folder, what its files end in)
    "fineweb-edu-10B": (FINEWEB_EDU, "sample/10BT", ".parquet"),
    "fineweb-edu-100B": (FINEWEB_EDU, "sample/100BT", ".parquet"),
    "fineweb-edu-350B": (FINEWEB_EDU, "sample/350BT", ".parquet"),
    "fineweb-edu-100B-tokens": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "", ".bin"),
}

# Bytes of all their files, about: 2.85 a token of FineWeb-Edu's parquet, as in its 10B sample, and 2 in token shards.
HUB_BYTES = {
    "fineweb-edu-10B": 28_500_000_000,
    "fineweb-edu-100B": 285_000_000_000,
    "fineweb-edu-350B": 998_000_000_000,
    "fineweb-edu-100B-tokens": 200_000_000_000,
}


def is_folder(corpus: str) -> bool:
    """Whether `corpus` names files by where they lie: on this machine or on S3."""
    return corpus != "embedded" and not corpus.startswith("datasets:") and hub_place(corpus) is None


@dataclass(frozen=True)
class HubPlace:
    """What a corpus's name says of a place on the hub."""

    label: str
    repo: str
    folder: str
    suffix: str
    revision: str
    files: int  # the first so many; 0: all


def hub_place(corpus: str) -> HubPlace | None:
    """The place on the hub that `corpus` names, or None where it names none."""
    match = re.fullmatch(r"(?P<base>.+?)(@(?P<revision>[\w./-]+))?(:(?P<files>\d+))?", corpus)
    if match is None:
        return None
    base, revision, files = match["base"], match["revision"] or "main", int(match["files"] or 0)
    if base in HUB_FOLDERS:
        return HubPlace(base, *HUB_FOLDERS[base], revision, files)
    if crawl := re.fullmatch(r"fineweb-edu:(CC-MAIN-[\w-]+)", base):
        return HubPlace(f"fineweb-edu-{crawl[1]}", FINEWEB_EDU, f"data/{crawl[1]}", ".parquet", revision, files)
    if place := re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/?(.*)", base):
        return HubPlace(objects.safe_name(base.split("/", 3)[3]), place[1], place[2], ".parquet", revision, files)
    return None


def expected_bytes(corpus: str) -> int | None:
    """Bytes of a corpus's files as far as they are known without a network; None where they are not."""
    if corpus == "embedded":
        return 0  # a few megabytes
    if place := hub_place(corpus):
        return None if place.files else HUB_BYTES.get(place.label)
    found = objects.list_files(corpus, ".parquet") if os.path.isdir(corpus) else []
    return sum(file.bytes for file in found) or None


def first_files(corpus: str, files: int) -> str:
    """The name of the first so many files of a corpus on the hub. Raises ValueError for any other corpus."""
    place = hub_place(corpus)
    if place is None or files < 1:
        raise ValueError(f"--files {files} takes the first files of a corpus on the hub, 1 or more; not of {corpus!r}")
    return f"{corpus.removesuffix(f':{place.files}')}:{files}"


@dataclass(frozen=True)
class Hub:
    """Files of a dataset on the hub: the same content is the same corpus, whatever commit it was found at."""

    place: HubPlace
    commit: str
    entries: tuple[hub.Entry, ...]
    name: str
    identity: dict[str, Any]
    checked: set[str] = field(default_factory=set, compare=False)  # files that `fetch` has seen to be the hub's

    @classmethod
    def at(cls, place: HubPlace) -> "Hub":
        commit = hub.commit_of(place.repo, place.revision)
        found = [e for e in hub.list_tree(place.repo, commit, place.folder) if e.path.endswith(place.suffix)]
        if not found:
            raise ValueError(f"{place.repo} has no {place.suffix} file in {place.folder or 'its root'}")
        found.sort(key=lambda e: (not shards.is_of(e.path, "val"), e.path))  # a shard for validation comes first
        chosen = found[: place.files or None]
        if place.suffix == ".bin" and len({shards.is_of(e.path, "val") for e in chosen}) < 2:
            raise ValueError(
                f"the first {len(chosen)} files of {place.label} are not a shard for validation and one for training: "
                "take --files 2 or more"
            )
        return cls.of(place, commit, [asdict(e) | {"sha256": e.sha256 or commit} for e in chosen])

    @classmethod
    def of(cls, place: HubPlace, commit: str, files: list[dict[str, Any]]) -> "Hub":
        """Of files that are known: path, bytes, sha256 each, the commit in place of a sha256 that is not known."""
        entries = tuple(hub.Entry(f["path"], f["bytes"], "" if f["sha256"] == commit else f["sha256"]) for f in files)
        identity = {"kind": "hub", "repo": place.repo, "files": files}
        return cls(place, commit, entries, f"{place.label}-{_digest(files)}", identity)

    @property
    def kind(self) -> str:
        return "tokens" if self.place.suffix == ".bin" else "documents"

    @property
    def details(self) -> dict[str, Any]:
        return {"url": f"{hub.endpoint()}/datasets/{self.place.repo}", "revision": self.commit}

    def fetch(self, out: str, progress: Progress, scratch: str = "") -> list[File]:
        self._check_those_there(out)
        missing = [e for e in self.entries if objects.name_of(e.path) not in self.checked]
        total = sum(e.bytes for e in self.entries)
        here = total - sum(e.bytes for e in missing)
        elsewhere = scratch or os.path.join(tempfile.gettempdir(), "gpt2-downloads")
        folder = out if objects.is_local(out) else os.path.join(elsewhere, self.name)

        def keep(entry: hub.Entry, local: str) -> None:
            if folder != out:
                objects.publish_file(local, objects.join(out, objects.name_of(entry.path)))
                os.unlink(local)
            self.checked.add(objects.name_of(entry.path))

        hub.fetch(
            self.place.repo, self.commit, missing, folder, lambda n: progress(here + n, total), keep, check_fetched
        )
        return [self._describe(out, entry) for entry in self.entries]

    def _check_those_there(self, out: str) -> None:
        """Files of the hub's size are taken for the hub's once they are hashed; one of other content is removed."""
        self.checked.clear()
        there = {s.path: s.bytes for s in objects.list_files(out)}
        kept = [e for e in self.entries if there.get(objects.name_of(e.path)) == e.bytes]
        urls = [objects.join(out, objects.name_of(e.path)) for e in kept]
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            for entry, url, digest in zip(kept, urls, pool.map(objects.sha256, urls), strict=True):
                if entry.sha256 in ("", digest):
                    self.checked.add(objects.name_of(url))
                else:
                    log.warning("%s has other content than on the hub: fetching it anew", url)
                    objects.remove(url)

    def text_bytes(self, enough: int) -> int:
        """Bytes of text in all files, by their ends alone, before they are fetched; counting stops at `enough`.

        Raises ValueError where a file is no parquet with text.
        """
        total, stopped = 0, threading.Event()
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(hub.PARALLEL) as pool:
            try:
                for here in pool.map(lambda entry: self._text_bytes_of(entry, scratch, stopped), self.entries):
                    total += here
                    if total >= enough:
                        break
            finally:
                stopped.set()  # those that wait for the hub
                pool.shutdown(wait=False, cancel_futures=True)
        return total

    def _text_bytes_of(self, entry: hub.Entry, scratch: str, stopped: threading.Event) -> int:
        local = os.path.join(scratch, objects.name_of(entry.path))
        hub.fetch_end(self.place.repo, self.commit, entry, local, parquet.FOOTER_BYTES, stopped)
        if (footer := parquet.footer_bytes(local)) > parquet.FOOTER_BYTES:
            hub.fetch_end(self.place.repo, self.commit, entry, local, footer, stopped)
        parquet.check_file(local)
        return sum(parquet.group_text_bytes(parquet.read_metadata(local)))

    def whole(self, out: str) -> list[str]:
        """The files that `fetch` has brought to `out` so far, in corpus order, up to the first that is missing."""
        names = (objects.name_of(e.path) for e in self.entries)
        return [objects.join(out, name) for name in itertools.takewhile(self.checked.__contains__, names)]

    def _describe(self, out: str, entry: hub.Entry) -> File:
        name = objects.name_of(entry.path)
        if not entry.sha256:
            return describe_file(out, name)
        stat = objects.stat(objects.join(out, name))
        return File(name, stat.bytes, stat.modified, entry.sha256)


def check_fetched(entry: hub.Entry, local: str) -> None:
    """Raises ValueError where a fetched file is no parquet with text, or no whole token shard."""
    if entry.path.endswith(".bin"):
        shards.read_header(local)
    else:
        parquet.check_file(local)


def _digest(files: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
