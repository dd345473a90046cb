"""The scaling benchmark, as it runs on eight GPUs, on 2 and 4 CPU ranks with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import ROOT
from tiny_run import environment

from benchmarks import check_training, scaling


@pytest.mark.slow
def test_the_same_script_runs_on_two_and_four_ranks(tmp_path: Path) -> None:
    out = tmp_path / "new"
    command = ["benchmarks/scaling.sh", str(out), "speed", "--", "--tiny", "--ranks", "2", "4"]
    variables = environment() | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((out / "scaling_speed.json").read_text())
    assert [row["ranks"] for row in rows] == [1, 2, 4]
    lone, rate = rows[0]["tokens_per_second"], rows[1]["tokens_per_second"] / 2
    assert rows[0]["efficiency"] == rows[0]["of_slowest"] == 1.0 and rows[1]["efficiency"] == rate / lone > 0
    assert rows[2]["batch_tokens"] == 2 * rows[1]["batch_tokens"]  # the same work on each rank
    assert "of slowest" in done.stdout


def test_without_tokens_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_SHARED_DATA", str(tmp_path))
    assert scaling.main(["speed", "equality"]) == 2
    assert f"{tmp_path}/fineweb_edu_style/sample holds no parquet files" in (said := capsys.readouterr().err)
    assert "--tokens FOLDER" in said
    assert scaling.main(["overlap", "--tokens", str(tmp_path)]) == 2
    assert f"--tokens {tmp_path} is no folder of token shards" in capsys.readouterr().err
    assert check_training.main(["--data", str(tmp_path)]) == 2
    assert "--data FOLDER" in capsys.readouterr().err
