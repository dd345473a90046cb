"""Do eight processes that end stages at once lose anything, and how long do they wait for each other?

    python benchmarks/lineage_writers.py FOLDER [--store s3://bucket/prefix] [--writers 8] [--stages 25]

Each process writes records and adds them to one index in FOLDER as stages do, as fast as it can. Beside them a reader
keeps the index open all the time, and in the middle the index is deleted, then overwritten with noise. At the end, one
`ingest` catches up, and every record has to be in the index. Prints the seconds that a stage took to end.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from storage import records
from storage.lineage import Lineage
from storage.records import File, Record


def end_stages(store: str, index: Path, writer: int, stages: int, ready: Any, told: Any) -> None:
    ready.wait()
    seconds = []
    for number in range(stages):
        key = f"corpora/w{writer}-{number}/documents"
        files = [File(f"{n:03d}.parquet", 10, "0", "ab" * 32) for n in range(20)]
        mark = records.fingerprint("documents", "1", {"key": key}, [])
        began = time.perf_counter()
        records.write_record(store, Record("documents", key, mark, "1", {"key": key}, [], files, _now(), _now()))
        Lineage(index).add(store, key)
        seconds.append(time.perf_counter() - began)
    told.put(seconds)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def run(store: str, index: Path, writers: int, stages: int, harm: bool) -> list[float]:
    """The seconds of each stage's end. Exits with 1 where a writer failed or a record is not in the index."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(writers + 1), context.Queue()
    started = [context.Process(target=end_stages, args=(store, index, w, stages, ready, told)) for w in range(writers)]
    for process in started:
        process.start()
    Lineage(index).ingest(store)
    with duckdb.connect(str(index), read_only=True):  # a reader that never lets go
        ready.wait()
        if harm:
            time.sleep(1)
            index.unlink()
            time.sleep(1)
            index.write_bytes(b"noise" * 10_000)
        seconds = [one for _ in started for one in told.get()]
    for process in started:
        process.join()
    began = time.perf_counter()
    caught_up = Lineage(index).ingest(store)
    took = time.perf_counter() - began
    count = Lineage(index).sql("SELECT count(*) FROM artifacts")[1][0][0]
    print(f"  records written {len(seconds)}, in the index {count}; the last ingest added {caught_up} in {took:.2f} s")
    if count != writers * stages or any(p.exitcode for p in started):
        sys.exit("something was lost")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="for the index, and the store unless --store")
    parser.add_argument("--store", help="another place for the records, such as s3://bucket/prefix")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--stages", type=int, default=25, help="that each writer ends")
    options = parser.parse_args()
    for harm in (False, True):
        name = "harmed" if harm else "left alone"
        place = Path(options.folder, name.replace(" ", "_"))
        place.mkdir(parents=True)
        store = f"{options.store}/{place.name}" if options.store else str(place / "store")
        print(f"index {name}, {options.writers} writers, a reader that keeps it open:")
        seconds = run(store, place / "lineage.duckdb", options.writers, options.stages, harm)
        middle, high = np.quantile(seconds, [0.5, 0.99])
        print(f"  a stage's end took {middle:.2f} s (median), {high:.2f} s (99%), {max(seconds):.2f} s at most")


if __name__ == "__main__":
    main()
