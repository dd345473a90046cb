"""Do interrupted jobs end with the same bytes? Tokenization killed at random moments, and a large download cut.

    python benchmarks/interruptions.py tokens FOLDER_OF_PARQUET [--kills 10] [--variants 1 2 ray]
    python benchmarks/interruptions.py download [--gigabytes 2] [--cuts 10] [--folder SCRATCH]

Every kill is a SIGKILL that hits a process at work: a run that ends before its kill is compared, and a new one is
begun for the kills that are left. The download comes from a small hub in this process, which first cuts its
connections, and then serves a client that is killed.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from storage import hub, objects, parquet, shards
from training import tokenization

ROOT = Path(__file__).resolve().parent.parent
REPO = "karpathy/fineweb-edu-100B-gpt2-token-shards"
FILE = "edu_fineweb_train_000001.bin"


def child(*words: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    errors = None if words[0] == "fetch" else subprocess.DEVNULL  # where Python tells what killed workers leave
    command = [sys.executable, __file__, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def digest(folder: Path) -> str:
    """sha256 over the names and contents of all shards and indexes."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".parquet"))
    listed = [f"{name} {objects.sha256(str(folder / name))}" for name in names]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def work(out: str, work_folder: str, variant: str, files: list[str]) -> None:
    """What the killed process does."""
    size = tokenization.automatic_shard_tokens(parquet.total_text_bytes(files))
    workers, engine = (2, "ray") if variant == "ray" else (int(variant), "processes")
    tokenization.tokenize(files, out, "c", size, work_folder, workers, lambda *_: None, engine_name=engine)


def run(place: Path, variant: str, files: list[str], kill_after: float = 0.0) -> bool:
    """One process -> whether it was killed at work."""
    process = child("work", str(place / "out"), str(place / "work"), variant, *files)
    if kill_after:
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    if process.wait():
        raise RuntimeError(f"variant {variant} failed with status {process.returncode}")
    return False


def tokens(folder: str, kills: int, variants: list[str], seed: int) -> None:
    files = sorted(map(str, Path(folder).rglob("*.parquet")))
    choose = random.Random(seed)
    print(f"{len(files)} files; seed {seed}")
    wanted = ""
    for variant in variants:
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            run(Path(scratch), variant, files)
            seconds = time.monotonic() - began
            found = digest(Path(scratch, "out"))
        wanted = wanted or found
        print(f"{variant:>4} uninterrupted, {seconds:5.1f} s: {found} {verdict(found == wanted)}", flush=True)
        hit, digests = 0, []
        while hit < kills:
            with tempfile.TemporaryDirectory() as scratch:
                while hit < kills and run(Path(scratch), variant, files, choose.uniform(0.1, 0.9) * seconds):
                    hit += 1
                run(Path(scratch), variant, files)
                digests.append(digest(Path(scratch, "out")))
        equal = set(digests) == {wanted}
        print(f"{variant:>4} {hit} kills over {len(digests)} runs: {digests[-1]} {verdict(equal)}", flush=True)


def verdict(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def fetch(url: str, size: int, sha256: str, local: str) -> None:
    hub.fetch_file(url, local, hub.Entry(FILE, size, sha256), lambda _: None)


def download(gigabytes: float, cuts: int, folder: Path, seed: int) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from local_hub import LocalHub

    folder.mkdir(parents=True, exist_ok=True)
    source, local = folder / "source.bin", folder / FILE
    count = int(gigabytes * 10**9 - shards.HEADER_BYTES) // 2
    write_source(source, count)
    size, wanted = source.stat().st_size, objects.sha256(str(source))
    content = memoryview(np.memmap(source, dtype=np.uint8, mode="r"))
    with LocalHub() as server:
        server.publish(REPO, "1", {FILE: content})  # type: ignore[dict-item]
        url = f"{server.url}/datasets/{REPO}/resolve/1/{FILE}"
        server.cut_after = -(-size // (cuts + 1))
        began = time.monotonic()
        fetch(url, size, wanted, str(local))
        report(f"{len(server.requests) - 1} connections cut", local, wanted, time.monotonic() - began)
        server.cut_after = 0
        server.requests.clear()
        marks = sorted(random.Random(seed).sample(range(size // 100, size * 9 // 10), cuts))
        began, hit = time.monotonic(), 0
        for mark in marks:
            hit += killed_at(mark, url, size, wanted, local)
        fetch(url, size, wanted, str(local))
        resumed = sum(bool(asked) for _, _, asked in server.requests)
        report(f"{hit} kills, {resumed} resumed with a Range", local, wanted, time.monotonic() - began)
    source.unlink()


def write_source(path: Path, count: int) -> None:
    """A token shard of that many random tokens."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as f:
        f.write(shards.header(shards.MAGIC, count))
        for start in range(0, count, 2**24):
            generator.integers(0, 50257, size=min(2**24, count - start), dtype=np.uint16).tofile(f)


def killed_at(mark: int, url: str, size: int, sha256: str, local: Path) -> bool:
    """Kill a fetching process once it has so many bytes -> whether it was still at work."""
    process = child("fetch", url, str(size), sha256, str(local))
    part = Path(f"{local}.part")
    while process.poll() is None and (part.stat().st_size if part.exists() else 0) < mark:
        time.sleep(0.001)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def report(what: str, local: Path, wanted: str, seconds: float) -> None:
    found = objects.sha256(str(local))
    print(f"{local.stat().st_size:,} bytes, {what}, {seconds:.1f} s: {found} {verdict(found == wanted)}", flush=True)
    local.unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizing = commands.add_parser("tokens")
    tokenizing.add_argument("folder")
    tokenizing.add_argument("--kills", type=int, default=10)
    tokenizing.add_argument("--variants", nargs="+", default=["1", "2", "ray"])
    fetching = commands.add_parser("download")
    fetching.add_argument("--gigabytes", type=float, default=2.0)
    fetching.add_argument("--cuts", type=int, default=10)
    fetching.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "gpt2-interruptions"))
    for command in (tokenizing, fetching):
        command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "tokens":
        tokens(options.folder, options.kills, options.variants, options.seed)
    else:
        download(options.gigabytes, options.cuts, options.folder, options.seed)
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:5], sys.argv[5:])
    elif sys.argv[1:2] == ["fetch"]:
        fetch(sys.argv[2], int(sys.argv[3]), *sys.argv[4:6])
    else:
        main()
