"""How fast do documents become shards, beside plain tiktoken on the same texts, on one and two workers?

    python benchmarks/tokenization.py FOLDER_OF_PARQUET [--rounds 3] [--times 4] [--items HELLASWAG_JSONL]

Each round runs all variants one after the other. Seconds are the wall's and, in brackets, the processors' (all
processes): on a machine that does other work only the second can be compared. Shards are made by a process of their
own, which has learned no words yet, from parquet files to shards, indexes and sha256; the lines of plain tiktoken and
riptoken only encode texts in memory. A second worker takes time to start and learns its words anew, so how the
speed scales shows on several copies of a small corpus, one after the other; how far the machine lets anything scale, on
two runs at once that share nothing. With items, also how long it takes to
look for them in the corpus, with one planted, on two workers.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
from interruptions import digest

from storage import parquet, tokenizer
from training import tokenization
from training.workers import process_pool


@dataclass(frozen=True)
class Taken:
    """What one run took."""

    tokens: int
    wall: float  # seconds
    cpu: float  # seconds of all processes
    peak: int = 0  # MiB of the largest process
    sha256: str = ""  # over all shards and indexes


def clock() -> tuple[float, float]:
    """(wall, processor) seconds, of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(run: Callable[[], int]) -> Taken:
    before = clock()
    tokens = run()
    return Taken(tokens, clock()[0] - before[0], clock()[1] - before[1])


def plain_tiktoken(files: list[str]) -> Callable[[], int]:
    texts = [text for batch in parquet.documents(files) for text in parquet.texts(batch)]
    encode = tokenizer.encoding().encode_ordinary
    return lambda: sum(len(encode(text)) + 1 for text in texts)


def riptoken(files: list[str]) -> Callable[[], int] | None:
    try:
        import riptoken
    except ModuleNotFoundError:
        return None
    texts = [text for batch in parquet.documents(files) for text in parquet.texts(batch)]
    special = {tokenizer.EOT_TEXT: tokenizer.EOT}
    encode = riptoken.CoreBPE(tokenizer.merge_ranks(), special, tokenizer.PATTERN).encode_ordinary
    return lambda: sum(len(encode(text)) + 1 for text in texts)


def shards(files: list[str], workers: int) -> Taken:
    """Of a process of its own."""
    command = [sys.executable, __file__, "shards", str(workers), *files]
    return Taken(**json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def two_runs(files: list[str]) -> Taken:
    """Two runs of one worker at once, which share nothing but the machine: how far this one scales at all."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: shards(files, 1), range(2)))
    return Taken(runs[0].tokens * 2, max(run.wall for run in runs), sum(run.cpu for run in runs))


def make_shards(workers: int, files: list[str]) -> None:
    """What that process does."""
    size = tokenization.automatic_shard_tokens(parquet.total_text_bytes(files))
    with tempfile.TemporaryDirectory() as folder:
        out, work = f"{folder}/out", f"{folder}/work"
        taken = timed(lambda: tokenization.tokenize(files, out, "c", size, work, workers, lambda *_: None).tokens)
        print(json.dumps(asdict(taken) | {"peak": peak_memory(), "sha256": digest(Path(out))}))


def peak_memory() -> int:
    """MiB of this process or of the largest that has worked for it; the first's ru_maxrss would be its parent's."""
    own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert own
    return max(int(own[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024


def contamination(files: list[str], location: str) -> None:
    """Look for the items, and for one made of a training document's words, on two workers."""
    from storage import inspection, items  # here alone: workers of tokenization load this file and do without

    asked = inspection.item_texts(items.read_items(location), "hellaswag")
    words = pq.read_table(files[-1], columns=["text"])["text"][7].as_py().split()[20:40]
    asked.append(("planted", " ".join(words)))
    before = clock()
    with process_pool(2) as pool:
        found = inspection.merged(list(pool.map(inspection.contamination, [[f] for f in files], [asked] * len(files))))
        peak = pool.submit(peak_memory).result()
    wall, cpu = clock()[0] - before[0], clock()[1] - before[1]
    text = parquet.total_text_bytes(files) / 1e6
    print(
        f"contamination: {found.items - 1:,} items and a planted one in {found.documents:,} documents ({text:,.0f} MB)"
    )
    print(f"  {wall:.1f} ({cpu:.1f}) s, {peak} MiB a worker; found: {', '.join(found.contaminated) or 'none'}")


def project(tokens: int, text_bytes: int, file_bytes: int, cpu: float, cores: int = 64) -> None:
    """What 10B and 100B tokens take, by the processor time that two workers took here, start included."""
    rate = tokens / cpu
    for wanted in (10**10, 10**11):
        seconds = wanted / rate
        read, written = wanted / tokens * file_bytes / 1e9, 2 * wanted / 1e9
        text = wanted / tokens * text_bytes / 1e9
        print(
            f"{wanted / 1e9:.0f}B tokens: {wanted:.0e} / {rate / 1e6:.2f}M tokens/s and core = {seconds:,.0f} core "
            f"seconds; / {cores} cores = {seconds / cores:,.0f} s; {text:,.0f} GB of text, {read:,.0f} GB of parquet "
            f"read and {written:,.0f} GB of shards written: {(read + written) / (seconds / cores):.1f} GB/s of disk"
        )


def tell(name: str, runs: list[Taken], base: float) -> None:
    """A line of a variant, by the medians of its runs; `base`: tokens a processor second of plain tiktoken."""
    each = ", ".join(f"{run.wall:.1f} ({run.cpu:.1f})" for run in runs)
    speed, rate = (runs[0].tokens / median(runs, seconds) for seconds in ("wall", "cpu"))
    print(
        f"{name:28} {each} s: {speed / 1e6:.2f} Mtok/s, {rate / 1e6:.2f} a core second, "
        f"{rate / base:.2f} times plain tiktoken" + (f"; {max(r.peak for r in runs)} MiB" if runs[0].peak else "")
    )


def tell_scaling(what: str, one: list[Taken], two: list[Taken], apart: list[Taken]) -> None:
    workers, machine = median(one, "wall") / 2 / median(two, "wall"), median(one, "wall") / median(apart, "wall")
    print(
        f"scaling 1 -> 2 workers: {workers:.1%} of twice the speed on {what}, by the wall's seconds; two runs at once "
        f"that share nothing: {machine:.1%}"
    )


def median(runs: list[Taken], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=4, help="copies of the corpus on which scaling is measured, too")
    parser.add_argument("--items", default="", help="HellaSwag's validation jsonl: how long it takes to look for them")
    options = parser.parse_args()
    files = sorted(map(str, options.folder.rglob("*.parquet")))
    in_memory = {"plain tiktoken": plain_tiktoken(files), "riptoken": riptoken(files)}
    variants = {name: lambda run=run: timed(run) for name, run in in_memory.items() if run}
    copies = {"": 1} | ({f", {options.times} copies": options.times} if options.times > 1 else {})
    for label, times in copies.items():
        variants[f"shards, 1 worker{label}"] = lambda times=times: shards(files * times, 1)
        variants[f"shards, 2 workers{label}"] = lambda times=times: shards(files * times, 2)
        variants[f"two runs, 1 worker each{label}"] = lambda times=times: two_runs(files * times)
    found: dict[str, list[Taken]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            found[name].append(run())
    rows, plain = sum(pq.ParquetFile(f).metadata.num_rows for f in files), found["plain tiktoken"]
    print(f"{rows:,} documents, {plain[0].tokens:,} tokens; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, runs in found.items():
        tell(name, runs, plain[0].tokens / median(plain, "cpu"))
    for label in copies:
        tell_scaling(
            label.removeprefix(", ") or "the corpus",
            found[f"shards, 1 worker{label}"],
            found[f"shards, 2 workers{label}"],
            found[f"two runs, 1 worker each{label}"],
        )
        digests = {run.sha256 for workers in ("1 worker", "2 workers") for run in found[f"shards, {workers}{label}"]}
        print(f"sha256 of the shards{label}, all runs: {', '.join(sorted(digests))}")
    if options.items:
        contamination(files, options.items)
    two = found[f"shards, 2 workers{list(copies)[-1]}"]
    sizes = sum(os.path.getsize(f) for f in files) * options.times
    project(two[0].tokens, parquet.total_text_bytes(files) * options.times, sizes, median(two, "cpu"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["shards"]:
        make_shards(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
