"""The scaling benchmark, as it runs on eight GPUs, on 2 and 4 CPU ranks with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import ROOT
from tiny_run import environment


@pytest.mark.slow
def test_the_same_script_runs_on_two_and_four_ranks(tmp_path: Path) -> None:
    command = ["benchmarks/scaling.sh", str(tmp_path), "speed", "--", "--tiny", "--ranks", "2", "4"]
    variables = environment() | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "scaling_speed.json").read_text())
    assert [row["ranks"] for row in rows] == [1, 2, 4]
    assert rows[0]["efficiency"] == rows[0]["of_slowest"] == 1.0 and 0 < rows[1]["efficiency"] < 2
    assert rows[2]["batch_tokens"] == 2 * rows[1]["batch_tokens"]  # the same work on each rank
    assert "of slowest" in done.stdout
