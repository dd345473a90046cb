"""Where does CORE's data come from, and is it what it was? A bundle as nanochat publishes it, fetched once and kept.

A bundle is a folder: core.yaml lists the tasks, eval_meta_data.csv their chance, eval_data/ holds one jsonl a task.
The archive's sha256 is written beside the unpacked folder; an archive with another one is refused from then on.
"""

import hashlib
import logging
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from storage import hub, objects

log = logging.getLogger(__name__)

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_VARIABLE = "GPT2_CORE_BUNDLE"  # another place of the same archive, such as a mirror
SEEN_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"  # as others noted it in June 2026
NAME, PIN = "eval_bundle", "eval_bundle.zip.sha256"


def bundle(folder: str) -> str:
    """The bundle's own folder, if `folder` is that; else the one that is, or comes to be, within it."""
    return folder if objects.exists(objects.join(folder, "core.yaml")) else fetch(folder)


def is_there(folder: str) -> bool:
    """Whether it needs no network any more."""
    return any(objects.exists(objects.join(folder, *inside, "core.yaml")) for inside in ((), (NAME,)))


def fetch(cache: str) -> str:
    """The bundle under `cache`, a local folder, downloaded where it is not there yet.

    Raises ValueError without a network, and for an archive that is not the one that was fetched here before.
    """
    if not objects.is_local(cache):
        raise ValueError(f"{cache} holds no core.yaml: put CORE's bundle there, or name a local folder to fetch it to")
    folder, pin = Path(cache) / NAME, Path(cache) / PIN
    if not (folder / "core.yaml").exists():
        archive = Path(cache) / f"{NAME}.zip.fetched"
        _download(os.environ.get(BUNDLE_VARIABLE, BUNDLE), archive)
        try:
            check_whole(archive)
            found = objects.sha256(str(archive))
            check(found, pin)
        except ValueError:
            archive.unlink()
            raise
        objects.publish_bytes(str(pin), f"{found}\n".encode())  # first: a folder that is there has its pin
        unpack(archive, cache)
        archive.unlink()
    return str(folder)


def check_whole(archive: Path) -> None:
    """Raises ValueError for an archive that ends early, or parts of two."""
    try:
        with zipfile.ZipFile(archive) as packed:
            torn = packed.testzip()
    except (zipfile.BadZipFile, zlib.error) as error:
        torn = str(error)
    if torn is not None:
        raise ValueError(f"{archive} is no whole zip archive ({torn}): its download broke off; run this again")


def check(found: str, pin: Path) -> None:
    """Raises ValueError where an earlier archive had another sha256 than `found`."""
    wanted = pin.read_text().strip() if pin.exists() else found
    if found != wanted:
        raise ValueError(
            f"CORE's bundle has changed since it was first fetched (sha256 {found[:12]}, {pin} says {wanted[:12]}): "
            f"scores on it would not compare with earlier ones; to take the new one all the same, remove {pin}"
        )
    if found != SEEN_SHA256:
        log.warning("CORE's bundle has sha256 %s; others noted %s in June 2026", found, SEEN_SHA256)


def _download(url: str, archive: Path) -> None:
    """Over as many connections as it takes; what an earlier process has begun is gone on with."""
    log.info("fetching CORE's bundle from %s", url)
    try:
        hub.fetch_file(url, str(archive), hub.Entry(archive.name, hub.size_of(url), ""), lambda _: None)
    except ValueError as error:
        raise ValueError(
            f"CORE's bundle can't be fetched from {url} ({error}): unpack eval_bundle.zip by hand and name its "
            "folder with evals.core"
        ) from error


def unpack(archive: Path, cache: str) -> None:
    """Into a temporary name, then by rename: a folder that is there is whole."""
    target, partial = Path(cache) / NAME, Path(cache) / f"{NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(partial)
    inner = partial / NAME
    (inner if inner.exists() else partial).rename(target)
    shutil.rmtree(partial, ignore_errors=True)


def digest(folder: str) -> str:
    """sha256 over the bundle's files by name: which data a score is of."""
    found = hashlib.sha256()
    for entry in objects.list_files(folder):
        if entry.path.startswith("eval_data/") or "/" not in entry.path:
            found.update(f"{entry.path} {objects.sha256(objects.join(folder, entry.path))}\n".encode())
    return found.hexdigest()
