"""Where do multiple-choice items come from, and are they all there?

HellaSwag's validation items from its published jsonl, fetched or at hand, in the raw schema or in a cleaned one
without ctx_a and ctx_b, or from the hub (`Rowan/hellaswag`, parquet, also through `datasets`). Kept as jsonl, and as
the file of tokens that llm.c reads.
"""

import gzip
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from storage import hub, objects, parquet, shards, tokenizer
from storage.library_source import local_digest
from storage.records import File, describe_file

PUBLISHED = "published"  # the place of HellaSwag's jsonl in its own repository
GITHUB = "https://raw.githubusercontent.com"  # GPT2_GITHUB_RAW names another server
HELLASWAG_FILE = "rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
HELLASWAG_REPO = "Rowan/hellaswag"
HELLASWAG_ITEMS = 10_042
THROUGH_LIBRARY = "datasets:"
FILES = ["items.jsonl", "items.bin"]


def hellaswag(location: str, out: str, scratch: str = "", revision: str = "") -> list[File]:
    """Put HellaSwag's validation items into `out`.

    `location` is a file, "published" (fetched by way of the local folder `scratch`), "hub", or "datasets:NAME"; the
    last two at the commit `revision`, which `revision_of` gives.
    Raises ValueError where they are not the 10,042 whole items of the published set, Unreachable without a network.
    """
    if location == PUBLISHED:
        items = read_items(fetch_published(scratch or tempfile.gettempdir()))
    elif location == "hub":
        items = from_hub(revision)
    elif location.startswith(THROUGH_LIBRARY):
        items = from_library(location.removeprefix(THROUGH_LIBRARY), revision)
    else:
        items = read_items(location)
    check_hellaswag(items, location)
    return write_items(items, out)


def hellaswag_version(location: str) -> str:
    """What tells the items of one place from those of another: their files' sha256, or a place with commits."""
    if location == PUBLISHED:
        return HELLASWAG_SHA256
    if location == "hub" or _repo(location):
        return location
    if location.startswith(THROUGH_LIBRARY):
        return local_digest(location.removeprefix(THROUGH_LIBRARY))
    return objects.sha256(location)


def revision_of(location: str) -> str:
    """The commit that a place on the hub is at now; empty for one without commits. Unreachable without a network."""
    repo = HELLASWAG_REPO if location == "hub" else _repo(location)
    return hub.commit_of(repo) if repo else ""


def _repo(location: str) -> str:
    """The hub's dataset that the `datasets` library is to load; empty for a local folder and for other places."""
    name = location.removeprefix(THROUGH_LIBRARY) if location.startswith(THROUGH_LIBRARY) else ""
    return "" if os.path.isdir(name) else name


def fetch_published(folder: str) -> str:
    """HellaSwag's validation jsonl in a local folder, its sha256 checked; a part that is there is gone on with."""
    url = f"{os.environ.get('GPT2_GITHUB_RAW', GITHUB).rstrip('/')}/{HELLASWAG_FILE}"
    local = os.path.join(folder, f"hellaswag-{HELLASWAG_SHA256[:8]}.jsonl")
    if not os.path.exists(local):
        hub.fetch_file(url, local, hub.Entry(HELLASWAG_FILE, hub.size_of(url), HELLASWAG_SHA256), lambda _: None)
    return local


def from_library(name: str, revision: str = "") -> list[dict[str, Any]]:
    """The validation split of a dataset that the `datasets` library loads: of the hub's, or in a local folder."""
    import datasets  # here alone: it takes a second, and other places do not need it

    rows = datasets.load_dataset(name, split="validation", revision=revision or None)
    return [_whole(name, n, dict(row)) for n, row in enumerate(rows, 1)]


def from_hub(commit: str) -> list[dict[str, Any]]:
    entries = [e for e in hub.list_tree(HELLASWAG_REPO, commit, "data") if "/validation-" in e.path]
    with tempfile.TemporaryDirectory() as scratch:
        paths = hub.fetch(HELLASWAG_REPO, commit, entries, scratch, lambda _: None)
        return [item for path in paths for item in read_items(path)]


def read_items(url: str) -> list[dict[str, Any]]:
    """Items of a .jsonl, .jsonl.gz or .parquet, each with ind, activity_label, ctx, endings and label.

    Other keys stay as they are. Raises ValueError naming the file and the item that is not whole.
    """
    if not objects.exists(url):
        raise ValueError(f"no items at {url}: name HellaSwag's validation jsonl, or `hub` to fetch it")
    if url.endswith(".parquet"):
        rows = parquet.read_table(url).to_pylist()
    else:
        data = objects.read_bytes(url)
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        rows = [_parse(url, n, line) for n, line in enumerate(io.StringIO(text), 1) if line.strip()]
    return [_whole(url, n, row) for n, row in enumerate(rows, 1)]


def _parse(url: str, number: int, line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{url}, line {number}, is no JSON object ({error}): fetch the file again") from error


def _whole(url: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The item with its label as a number: the hub's copy has it as text."""
    missing = [key for key in ("activity_label", "ctx", "endings", "label") if row.get(key) in (None, "")]
    if missing:
        raise ValueError(f"{url}, item {number}, has no {', '.join(missing)}: are these HellaSwag's labelled items?")
    endings = list(row["endings"]) if isinstance(row["endings"], Iterable) else []
    label = str(row["label"])
    if len(endings) != shards.CHOICES or label not in map(str, range(shards.CHOICES)):
        raise ValueError(
            f"{url}, item {number}, has {len(endings)} endings and label {label}, not four "
            "endings and a label of 0 to 3"
        )
    return {"ind": number - 1, **row, "label": int(label), "endings": endings}


def check_hellaswag(items: Sequence[dict[str, Any]], location: str) -> None:
    """Raises ValueError where `items` are not the published validation set, by count, repeats and labels."""
    asked = Counter((item["ctx"], tuple(item["endings"])) for item in items)
    repeated = sum(count - 1 for count in asked.values())
    if len(items) != HELLASWAG_ITEMS or repeated > HELLASWAG_ITEMS // 100:
        raise ValueError(
            f"{location} has {len(items):,} items, {repeated:,} of them repeated: HellaSwag's validation set "
            f"has {HELLASWAG_ITEMS:,}; use hellaswag_val.jsonl of rowanz/hellaswag, or `hub`"
        )


def core_texts(folder: str) -> list[tuple[str, str]]:
    """Each item of DCLM CORE's bundle with its right answer, as (name, text)."""
    data = objects.join(folder, "eval_data")
    texts = []
    for found in objects.list_files(data, ".jsonl"):
        lines = objects.read_text(objects.join(data, found.path)).splitlines()
        for number, item in enumerate(json.loads(line) for line in lines if line.strip()):
            gold = item.get("gold", 0)
            asked = item.get("query") or item.get("context") or item["context_options"][gold]
            answer = item["choices"][gold] if "choices" in item else item["continuation"]
            texts.append((f"core {objects.name_of(found.path).removesuffix('.jsonl')} {number}", f"{asked} {answer}"))
    return texts


def write_items(items: Sequence[dict[str, Any]], out: str) -> list[File]:
    """Publish items as jsonl and in llm.c's format: a space stands before each ending."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    objects.publish_bytes(objects.join(out, FILES[0]), lines.encode())
    shards.write_choices(objects.join(out, FILES[1]), [_choice(item) for item in items])
    return [describe_file(out, name) for name in FILES]


def _choice(item: dict[str, Any]) -> shards.Choice:
    endings = [tokenizer.encode(f" {ending}").tolist() for ending in item["endings"]]
    return shards.Choice(tuple(tokenizer.encode(item["ctx"]).tolist()), tuple(map(tuple, endings)), item["label"])
