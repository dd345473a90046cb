"""A worker of tokenization takes less than 600 MiB, however large a file or a row group is."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pipeline import ROOT

CHILD = """
import sys
from training import pieces
for piece in pieces.plan_pieces(sys.argv[2:]):
    print(pieces.encode_piece(sys.argv[1], piece)[1].documents)
print(open("/proc/self/status").read())
"""


@pytest.mark.slow
def test_a_row_group_of_300_mb_is_never_held_whole(tmp_path: Path) -> None:
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randrange(2, 9))) for _ in range(20_000)]
    texts = [" ".join(choose.choices(words, k=1000)) for _ in range(400)]
    file = str(tmp_path / "large.parquet")
    pq.write_table(pa.table({"text": texts * 128}), file, row_group_size=10**6)
    metadata = pq.read_metadata(file)
    assert metadata.num_row_groups == 1 and 128 * sum(map(len, texts)) > 300_000_000
    assert peak(tmp_path, file, 128 * len(texts)) < 600


@pytest.mark.slow
def test_large_documents_are_not_held_together(tmp_path: Path) -> None:
    """Twenty of 4 MB in one row group, and one of 40 MB in another."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randrange(2, 9))) for _ in range(20_000)]
    text = " ".join(choose.choices(words, k=650_000))
    texts = [text[n:] + text[:n] for n in range(20)]
    file = str(tmp_path / "large.parquet")
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts}))
        writer.write_table(pa.table({"text": ["\n".join(texts[:10])]}))
    assert peak(tmp_path, file, 20, 1) < 600


def peak(tmp_path: Path, file: str, *documents: int) -> int:
    """MiB that a process takes at most which encodes the pieces of a file."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pieces"), file]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[: len(documents)] == list(map(str, documents))
    highest = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert highest
    return int(highest[1]) // 1024
