"""How fast do documents become shards, beside plain tiktoken on the same texts, on one and two workers?

    python benchmarks/tokenization.py FOLDER_OF_PARQUET [--rounds 3] [--times 1] [--items HELLASWAG_JSONL]

Each round runs all variants one after the other. Seconds are the wall's and, in brackets, the processors' (all
processes): on a machine that does other work only the second can be compared. Reading parquet, the indexes and
the shards are included, but in plain tiktoken's and riptoken's own lines, which only encode texts in memory. With
items, also how long it takes to look for them in the corpus, with one planted, on two workers.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from storage import inspection, items, sources, tokenizer
from training import tokenization
from training.workers import process_pool


def clock() -> tuple[float, float]:
    """(wall, processor) seconds, of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def plain_tiktoken(files: list[str]) -> Callable[[], int]:
    texts = [text for batch in sources.documents(files) for text in sources.texts(batch)]
    encode = tokenizer.encoding().encode_ordinary
    return lambda: sum(len(encode(text)) + 1 for text in texts)


def riptoken(files: list[str]) -> Callable[[], int] | None:
    try:
        import riptoken
    except ModuleNotFoundError:
        return None
    texts = [text for batch in sources.documents(files) for text in sources.texts(batch)]
    special = {tokenizer.EOT_TEXT: tokenizer.EOT}
    encode = riptoken.CoreBPE(tokenizer.merge_ranks(), special, tokenizer.PATTERN).encode_ordinary
    return lambda: sum(len(encode(text)) + 1 for text in texts)


def shards(files: list[str], workers: int) -> Callable[[], int]:
    size = tokenization.automatic_shard_tokens(sources.total_text_bytes(files))

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            out, work = f"{folder}/out", f"{folder}/work"
            return tokenization.tokenize(files, out, "c", size, work, workers, lambda *_: None).tokens

    return run


PEAK = """
import re, sys, tempfile
from training import pieces
with tempfile.TemporaryDirectory() as place:
    for piece in pieces.plan_pieces(sys.argv[1:]):
        pieces.encode_piece(place, piece)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def peak_memory(files: list[str]) -> int:
    """MiB that a process of its own takes at most while it encodes all pieces."""
    return int(subprocess.run([sys.executable, "-c", PEAK, *files], capture_output=True, check=True).stdout)


def contamination(files: list[str], location: str) -> None:
    """Look for the items, and for one made of a training document's words, on two workers."""
    asked = inspection.item_texts(items.read_items(location), "hellaswag")
    words = pq.read_table(files[-1], columns=["text"])["text"][7].as_py().split()[20:40]
    asked.append(("planted", " ".join(words)))
    before = clock()
    with process_pool(2) as pool:
        found = inspection.merged(list(pool.map(inspection.contamination, [[f] for f in files], [asked] * len(files))))
    wall, cpu = clock()[0] - before[0], clock()[1] - before[1]
    text = sources.total_text_bytes(files) / 1e6
    print(
        f"contamination: {found.items - 1:,} items and a planted one in {found.documents:,} documents ({text:,.0f} MB)"
    )
    print(f"  {wall:.1f} ({cpu:.1f}) s, found: {', '.join(found.contaminated) or 'none'}")


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--times", type=int, default=1, help="shards of so many copies: starting a worker takes a second"
    )
    parser.add_argument("--items", default="", help="HellaSwag's validation jsonl: how long it takes to look for them")
    options = parser.parse_args()
    files = sorted(map(str, options.folder.rglob("*.parquet")))
    variants = {
        "plain tiktoken": plain_tiktoken(files),
        "riptoken": riptoken(files),
        "shards, 1 worker": shards(files * options.times, 1),
        "shards, 2 workers": shards(files * options.times, 2),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    tokens: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, run in variants.items():
            if run:
                before = clock()
                tokens[name] = run()
                seconds[name].append((clock()[0] - before[0], clock()[1] - before[1]))
    rows = sum(pq.ParquetFile(f).metadata.num_rows for f in files)
    once, load = tokens["plain tiktoken"], os.getloadavg()[0]
    print(f"{rows:,} documents, {once:,} tokens, {options.times} times in shards; load {load:.1f} on {os.cpu_count()}")
    base = tokens["plain tiktoken"] / statistics.median(cpu for _, cpu in seconds["plain tiktoken"])
    for name, runs in seconds.items():
        if runs:
            wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
            each = ", ".join(f"{w:.1f} ({c:.1f})" for w, c in runs)
            rate = tokens[name] / cpu
            print(f"{name:18} {each} s: {tokens[name] / wall / 1e6:.2f} Mtok/s, {rate / 1e6:.2f} per core", end="")
            print(f", {rate / base:.2f} times plain tiktoken")
    one, two = (statistics.median(wall for wall, _ in seconds[f"shards, {n}"]) for n in ("1 worker", "2 workers"))
    print(f"from 1 to 2 workers: {one / two:.2f} times as fast, {one / two / 2:.0%} of twice")
    print(f"memory of one worker at its highest: {peak_memory(files):,} MiB")
    if options.items:
        contamination(files, options.items)
    cpu = statistics.median(cpu for _, cpu in seconds["shards, 2 workers"])
    made, sizes = tokens["shards, 2 workers"], sum(os.path.getsize(f) for f in files) * options.times
    project(made, sources.total_text_bytes(files) * options.times, sizes, cpu)


if __name__ == "__main__":
    main()
