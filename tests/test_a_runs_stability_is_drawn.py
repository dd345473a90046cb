"""The stability benchmark, on a run of the trainer's own."""

from pathlib import Path

import pytest
import tiny_run

from benchmarks import stability


def test_a_run_is_drawn_and_its_extremes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.speedrun(health_every=2))
    trainer = tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"))
    assert stability.main([run, f"{run}=again", "--out", str(tmp_path / "figure.png")]) == 0
    one, again = capsys.readouterr().out.splitlines()[-2:]
    assert one.startswith("run: largest attention logit ") and one.removeprefix("run") == again.removeprefix("again")
    assert one.endswith(f"last loss {tiny_run.losses(run)[-1]:.4f}, 0 skipped") and trainer.progress.step == 6
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_a_run_that_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stability.main([str(tmp_path / "absent")]) == 2
    assert "name a run's folder" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "skipped": 0}\n')
    assert stability.main([str(tmp_path)]) == 2
    assert "train the run with health_every=100" in capsys.readouterr().err
