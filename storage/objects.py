"""How are bytes read, listed and published, on a local disk and on S3 alike?

A location is a string: a local path or an `s3://bucket/key` URL (endpoint and keys from the usual AWS
variables). Nothing is ever half-written under its final name: local files are written beside it and renamed,
an S3 object appears with the PUT that completes it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

REACH_S3 = "check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
DISK_IS_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")  # the last: SQLite
OF_AN_OBJECT = {"NoSuchKey", "404", "PreconditionFailed", "412", "InvalidRange", "416"}  # missing, or another by now


@dataclass(frozen=True)
class Stat:
    path: str  # relative to the listed location; the last part of it for a single file
    bytes: int
    modified: str  # changes when the content does: mtime in ns locally, the ETag on S3
    written: float = 0.0  # when, in seconds since 1970


def is_local(url: str) -> bool:
    """Raises ValueError for an address that would become a local folder of an odd name, as s3://$UNSET would."""
    check_address(url)
    return "://" not in url


def check_address(url: str) -> None:
    """Raises ValueError for what is neither a local path nor an address on S3."""
    if url.startswith("s3:"):
        if not re.match("s3://[^/]", url):
            raise ValueError(
                f"{url} is no place on S3: write s3://bucket/prefix, with two slashes and a bucket (a variable that "
                "names it may be empty)"
            )
    elif "://" in url:
        raise ValueError(f"{url}: only local paths and s3:// locations are supported")


def join(root: str, *parts: str) -> str:
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def within(folder: str, path: str) -> str:
    """Where a file of a folder lies; absolute paths and URLs stay as they are."""
    return path if path.startswith("/") or not is_local(path) else join(folder, path)


def absolute(url: str) -> str:
    return os.path.abspath(url) if is_local(url) else url


def name_of(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def safe_name(text: str) -> str:
    """`text` with what a path or an object key can't hold turned into dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "corpus"


def exists(url: str) -> bool:
    return os.path.exists(url) if is_local(url) else bool(s3().exists(url))


def open_file(url: str) -> BufferedReader:
    """Open for reading bytes. To write, use the `publish` functions."""
    return open(url, "rb") if is_local(url) else s3().open(url, "rb")


def read_bytes(url: str, start: int = 0) -> bytes:
    """An object from byte `start` on. It may be replaced meanwhile: a file opened on S3 insists on the one it was."""
    if is_local(url):
        with open(url, "rb") as f:
            f.seek(start)
            return f.read()
    return bytes(s3().cat_file(url)[start:])  # a range that an object no longer has would be refused


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_json(url: str) -> Any:
    """Raises ValueError, naming the file, for what is no JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise ValueError(f"{url} is no JSON ({error})") from error


def stat(url: str) -> Stat:
    """Raises FileNotFoundError where there is nothing."""
    if is_local(url):
        info = os.stat(url)
        return Stat(name_of(url), info.st_size, str(info.st_mtime_ns), info.st_mtime)
    return _remote_stat(name_of(url), s3().info(url))


def list_files(url: str, suffix: str = "") -> list[Stat]:
    """All files at or below `url`, sorted by path; empty where there is nothing."""
    found = _list_local(url) if is_local(url) else _list_remote(url)
    return sorted((s for s in found if s.path.endswith(suffix)), key=lambda s: s.path)


def _list_local(root: str) -> Iterator[Stat]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                info = os.stat(path)
            except FileNotFoundError:  # renamed or removed since it was listed: others write while we look
                continue
            yield Stat(os.path.relpath(path, root), info.st_size, str(info.st_mtime_ns), info.st_mtime)


def _list_remote(root: str) -> Iterator[Stat]:
    fs = s3()
    prefix = fs._strip_protocol(root).rstrip("/") + "/"
    for path, info in fs.find(root, detail=True).items():
        if info["type"] == "file" and path.startswith(prefix):
            yield _remote_stat(path.removeprefix(prefix), info)


def _remote_stat(path: str, info: dict[str, Any]) -> Stat:
    written = info["LastModified"].timestamp()
    return Stat(path, info["size"], str(info.get("ETag", "")).strip('"'), written)


def publish_bytes(url: str, data: bytes) -> None:
    """Make `data` the content of `url`, at once or not at all."""
    if is_local(url):
        with _published(url) as partial:
            partial.write_bytes(data)
    else:
        s3().pipe_file(url, data)


def publish_json(url: str, value: Any) -> None:
    publish_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def publish_file(local: str, url: str) -> None:
    """Copy a local file to `url`, which appears only when it is complete."""
    if is_local(url):
        with _published(url) as partial:
            shutil.copyfile(local, partial)
    else:
        s3().put_file(local, url)


@contextmanager
def _published(path: str) -> Iterator[Path]:
    """A file beside its final name while it is written: synced and renamed on success, removed on failure."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        sync(str(partial))
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str) -> None:
    """Have the disk hold a local file's bytes, or a folder's names, before anything says that they are there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create_exclusive(url: str, data: bytes) -> bool:
    """Create `url` with `data` unless it exists; False when somebody else was first."""
    try:
        if is_local(url):
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            with open(url, "xb") as f:
                f.write(data)
        else:
            s3().pipe_file(url, data, mode="create")
    except FileExistsError:
        return False
    return True


def remove(url: str) -> None:
    if is_local(url):
        os.unlink(url)
    else:
        s3().rm_file(url)


def remove_tree(url: str) -> None:
    """Remove everything at or below `url`; nothing happens where there is nothing."""
    if is_local(url):
        if os.path.isdir(url):
            shutil.rmtree(url)
    elif list_files(url):
        s3().rm(url, recursive=True)


def unfinished_uploads(url: str) -> list[Stat]:
    """Uploads in parts to S3 below `url` that were neither completed nor given up; `modified` is the upload's id."""
    bucket, prefix = _bucket(url)
    answer = s3().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
    found = []
    for upload in answer.get("Uploads", []):
        where = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        parts = s3().call_s3("list_parts", **where).get("Parts", [])
        path, size = upload["Key"].removeprefix(f"{prefix}/"), sum(part["Size"] for part in parts)
        found.append(Stat(path, size, upload["UploadId"], upload["Initiated"].timestamp()))
    return found


def abort_upload(url: str, upload: str) -> None:
    bucket, key = _bucket(url)
    s3().call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


def _bucket(url: str) -> tuple[str, str]:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    return bucket, key


def copy_tree(source: str, destination: str) -> None:
    """Copy every file below `source`."""
    for found in list_files(source):
        copy(join(source, found.path), join(destination, found.path))


def fetch(source: str, local: str) -> None:
    """Copy `source` to the local path unless a file of its size is there already: for files that never change."""
    if not (os.path.exists(local) and os.path.getsize(local) == stat(source).bytes):
        copy(source, local)


def copy(source: str, destination: str) -> None:
    """Copy one file; the copy appears only when it is complete."""
    if is_local(source):
        publish_file(source, destination)
    elif is_local(destination):
        with _published(destination) as partial:
            s3().get_file(source, str(partial))
    else:
        s3().copy(source, destination)


def sha256(url: str) -> str:
    with open_file(url) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_writable(url: str) -> None:
    """Raise ValueError, with the reason and the fix, where nothing can be written."""
    probe = join(url, f".writable-{uuid.uuid4().hex[:8]}")
    try:
        publish_bytes(probe, b"")
        remove(probe)
    except failures() as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fix = "choose a folder you may write to with --store" if is_local(url) else REACH_S3
        raise ValueError(f"the store {url} can't be written ({reason}): {fix}") from error


def failures() -> tuple[type[Exception], ...]:
    """What can go wrong with a location that a user named; S3's client has errors of its own, once it is loaded."""
    if "botocore" not in sys.modules:
        return (OSError,)
    from botocore.exceptions import BotoCoreError

    return (OSError, BotoCoreError)


def refusal(error: BaseException) -> str:
    """Why the store can't be read or written, and the fix; empty for an error that says something else."""
    return _full_disk(error) or _s3_refusal(error) or _no_permission(error)


def _full_disk(error: BaseException) -> str:
    """Also of a library's error that has the system's behind it; not of a RuntimeError, which may quote a process."""
    for behind in _causes(error):
        if not isinstance(behind, RuntimeError) and any(said in str(behind) for said in DISK_IS_FULL):
            return f"the disk is full ({str(behind).splitlines()[0]}): make room on it, or choose another with --store"
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those behind it, each once: they may stand in a circle."""
    found: list[BaseException] = []
    behind: BaseException | None = error
    while behind and behind not in found:
        found.append(behind)
        behind = behind.__cause__ or behind.__context__
    return found


def _s3_refusal(error: BaseException) -> str:
    """Why S3 can't be asked, or does not let us."""
    if "botocore" not in sys.modules:
        return ""
    from botocore.exceptions import BotoCoreError, ClientError

    answer = error.__cause__  # s3fs makes an OSError of what the server answers
    refused = isinstance(answer, ClientError) and answer.response["Error"]["Code"] not in OF_AN_OBJECT
    if not (refused or isinstance(error, BotoCoreError)):
        return ""
    return f"S3 can't be read or written ({error}): {REACH_S3}"


def _no_permission(error: BaseException) -> str:
    """Which file or folder this user may not read or write."""
    if not (isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename):
        return ""
    return (
        f"{error.filename} can't be read or written ({error.strerror}): choose folders that you may write to, for the "
        "store with --store, for the home with GPT2_HOME"
    )


def free_bytes(url: str) -> int | None:
    """Free space where `url` lies or would lie; None on S3, which has no such number."""
    if not is_local(url):
        return None
    path = Path(url).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def s3() -> Any:
    """fsspec's filesystem of S3. Listings are never cached: other processes write to the same store."""
    import fsspec  # a fifth of the time in which a worker of tokenization starts

    return fsspec.filesystem("s3", use_listings_cache=False)
