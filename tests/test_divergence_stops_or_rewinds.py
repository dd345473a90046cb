"""A run that goes wrong stops with its good checkpoints kept, or goes back and past the data that did it."""

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from storage.checkpoints import complete
from training.outliers import OutlierWindow, divergence
from training.train import DIVERGED, Stop, Trainer

BAD = range(40 * 8, 50 * 8)  # positions whose loss is not a number: those of steps 40 to 49


def trainer(tmp_path: Path, on_divergence: str) -> Trainer:
    """A run whose data are broken at the positions BAD."""
    config = tiny_run.config(steps=60, checkpoint_every=5, keep_checkpoints=20, on_divergence=on_divergence)
    run = tiny_run.folder(tmp_path / "run", config)
    made = Trainer(config, run, tiny_run.tokens(tmp_path / "tokens"), tiny_run.alone(), Stop())
    backward = made.backward

    def poisoned() -> torch.Tensor:
        loss = backward()
        if made.progress.position in BAD:
            for bucket in made.optimizer.buckets:
                bucket.gradients.fill_(math.nan)
            return loss * math.nan
        return loss

    made.backward = poisoned  # type: ignore[method-assign]
    return made


def finite(made: Trainer) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


def test_by_default_it_stops_after_eight_skips_in_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, "stop")
    assert made.loop() == DIVERGED
    made.checkpoints.wait()
    assert made.progress.step == 48 and made.progress.skipped == 8
    assert "diverged at step 48: 8 updates in a row were outliers" in caplog.text
    assert complete(made.run)[-1] == 45 and finite(made)


def test_it_rewinds_to_a_checkpoint_from_before_and_goes_past_the_data(tmp_path: Path) -> None:
    made = trainer(tmp_path, "rewind")
    assert made.loop() == 0
    made.checkpoints.wait()
    assert made.progress.rewinds == 1 and finite(made)
    # 48 steps, back to 15, the rest of the bad data (2 steps) skipped, and on to 60
    assert made.progress.position == (48 + 60 - 15) * 8
    assert made.progress.skipped == 2
    lines = Path(made.run, "main.log").read_text().splitlines()
    steps = [int(line.split()[0][2:]) for line in lines if " trl:" in line]
    assert steps == list(range(60))
    assert "nan" not in "".join(lines[-20:])


def test_a_run_killed_after_a_rewind_goes_on_past_the_data(tmp_path: Path) -> None:
    made = trainer(tmp_path, "rewind")
    step = made.step

    def until_rewound() -> None:
        if made.progress.rewinds:
            made.stop.asked = True
        step()

    made.step = until_rewound  # type: ignore[method-assign]
    made.loop()
    made.checkpoints.wait()
    again = Trainer(made.config, made.run, str(tmp_path / "tokens"), tiny_run.alone(), Stop())
    assert (again.progress.step, again.progress.position, again.progress.rewinds) == (16, 49 * 8, 1)


@pytest.mark.parametrize(("rise", "diverged"), [(0.0, False), (0.1, False), (0.5, True), (-0.5, False)])
def test_a_sustained_rise_is_a_divergence(rise: float, diverged: bool) -> None:
    values = np.random.default_rng(0).normal(3.0, 0.05, 128)
    values[-32:] += rise
    assert bool(divergence(0, OutlierWindow(values=values.tolist()))) == diverged
    assert divergence(0, OutlierWindow(values=values[:100].tolist())) == ""
