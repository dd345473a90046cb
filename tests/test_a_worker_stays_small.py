"""A worker of tokenization or inspection takes less than 600 MiB, however large a file or a row group is."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pipeline import ROOT

from training import pieces

ENCODE = """
import sys
from training import pieces
for piece in pieces.plan_pieces(sys.argv[2:]):
    print(pieces.encode_piece(sys.argv[1], piece)[1].documents)
print(open("/proc/self/status").read())
"""

INSPECT = """
import sys
from storage import inspection
print(inspection.duplicates(sys.argv[1:]).documents)
print(inspection.contamination(sys.argv[1:], [("item", " ".join("abcdefghijklm"))]).documents)
print(open("/proc/self/status").read())
"""

CUT = """
import sys
import pyarrow.parquet as pq
from training import cuts, pieces
whole = [pieces.Piece(n, "", "", (0,), 0, 1, "key") for n in range(7)]
starts = [16_000_000 * n for n in range(7)]
cuts.cut_shard(sys.argv[1], sys.argv[2], "c", cuts.Cut(0, 0, 100_000_000, tuple(whole), tuple(starts)))
print(pq.read_metadata(sys.argv[2] + "/c_val_000000.documents.parquet").num_rows)
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


@pytest.mark.slow
def test_a_million_short_documents_are_not_described_together(tmp_path: Path) -> None:
    """A row group of them, as reviews and messages are, with long ids and addresses."""
    rows = range(1_000_000)
    texts, ids = [f"a b {n % 1000}" for n in rows], [f"<urn:uuid:{n:090d}>" for n in rows]
    urls = [f"https://example.com/reviews/of/some/product/{n:0150d}" for n in rows]
    file = str(tmp_path / "short.parquet")
    pq.write_table(pa.table({"text": texts, "id": ids, "url": urls}), file, row_group_size=10**7)
    assert peak(tmp_path, file, len(rows)) < 600


@pytest.mark.slow
def test_a_shard_of_short_documents_is_cut_without_its_whole_index(tmp_path: Path) -> None:
    """3.3 million documents of 30 tokens."""
    count, place = 16_000_000 // 30, str(tmp_path / "pieces")
    os.mkdir(place)
    rows = np.arange(count)
    columns = {"id": [f"<urn:uuid:{n:036d}>" for n in rows], "url": [f"https://example.com/{n:060d}" for n in rows]}
    columns |= {"dump": pa.nulls(count, pa.string()), "file": pa.repeat("corpora/reviews/documents/0.parquet", count)}
    columns |= {"row": rows, "start": rows * 30, "position": rows * 30, "tokens": np.full(count, 30)}
    index = pa.table(columns, schema=pieces.INDEX_SCHEMA)
    for number in range(7):
        piece = pieces.Piece(number, "", "", (0,), 0, 1, "key")
        if number == 0:
            pieces.write_index(piece.path(place, "parquet"), [index])
            np.zeros(16_000_000, np.uint16).tofile(piece.path(place, "bin"))
        else:
            for kind in ("parquet", "bin"):
                os.link(f"{place}/000000-key.{kind}", piece.path(place, kind))
    assert highest([CUT, place, str(tmp_path / "out")], 6 * count + 4_000_000 // 30 + 1) < 600


@pytest.mark.slow
def test_a_document_of_40_mb_is_inspected_part_by_part(tmp_path: Path) -> None:
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randrange(2, 9))) for _ in range(20_000)]
    file = str(tmp_path / "large.parquet")
    pq.write_table(pa.table({"text": [" ".join(choose.choices(words, k=6_500_000))]}), file)
    assert highest([INSPECT, file], 1, 1) < 600


def peak(tmp_path: Path, file: str, *documents: int) -> int:
    """MiB that a process takes at most which encodes the pieces of a file."""
    return highest([ENCODE, str(tmp_path / "pieces"), file], *documents)


def highest(code: list[str], *documents: int) -> int:
    """MiB that a process takes at most which runs code and prints how many documents it has seen."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", *code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600).stdout
    assert said.split("\n")[: len(documents)] == list(map(str, documents))
    found = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert found
    return int(found[1]) // 1024
