"""docs/recipe.md's measured figures are those of benchmarks/results, to the digit that is shown."""

import json
import sys
from statistics import mean
from typing import Any

import pytest
from tiny_pipeline import ROOT

from benchmarks import time_to_loss
from benchmarks.ablations import base_of
from training.config import RunConfig, from_dict

PAGE = (ROOT / "docs/recipe.md").read_text().replace("**", "")


def results(name: str) -> list[dict[str, Any]]:
    return list(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()).values())


@pytest.mark.parametrize("name", ["fp8", "bf16", "speed"])
def test_what_the_124m_class_reaches(name: str) -> None:
    runs = [run for run in results("time_to_loss") if run["variant"] == name]
    there = [at for run in runs if (at := time_to_loss.passed(run, time_to_loss.TARGET))]
    train = runs[0]["config"]["train"]
    losses, seconds = [run["final_loss"] for run in runs], [run["seconds"] for run in runs]
    cells = [f"{train['steps'] * train['batch_tokens'] / 1e6:.1f}M", time_to_loss.mean(losses, ".4f")]
    cells += [time_to_loss.mean(seconds, ".1f"), f"{mean(s for _, s in there):.1f}, at step {there[0][0]}"]
    assert f"| {' | '.join(cells)} | {runs[0]['peak_gib']:.1f} |" in PAGE
    assert len(there) == len(runs) and {step for step, _ in there} == {there[0][0]}
    assert f"{mean(run['tokens_per_second'] for run in runs):,.0f}"[:-2] + "00" in PAGE
    if name == "fp8":
        found = f"{mean(losses):.3f} after {mean(seconds):.0f} s and 78.6M"
        assert found in (ROOT / "README.md").read_text()


def test_the_commands_make_these_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, bf16 = (line for line in PAGE.splitlines() if line.endswith("health_every=25"))
    more = "weight_decay=0 momentum_warmup_steps=0 --seeds 5"
    assert f"`{more}` behind it" in PAGE
    for name, command in (("fp8", fp8), ("bf16", bf16), ("speed", f"{bf16} {more}")):
        monkeypatch.setattr(sys, "argv", command.split()[2:])
        options = time_to_loss.arguments()
        runs = [run for run in results("time_to_loss") if run["variant"] == name]
        assert [run["seed"] for run in runs] == list(time_to_loss.seeds(options))
        for run in runs:
            config = time_to_loss.configure(options.recipe, options.set, run["seed"], options)
            assert config == from_dict(RunConfig, run["config"])


def test_what_the_350m_class_reaches() -> None:
    for run in results("time_to_loss_350m"):
        assert f"| 39.3M | {run['final_loss']:.3f} | {run['seconds']:.1f} | " in PAGE


# A candidate in a whole run, and what the page takes its loss from.
WHOLE = {
    "fp8": ("", "A"),
    "momentum-warmup": ("", "A"),
    "momentum-warmup-decay0.1": ("momentum-warmup", "B"),
    "momentum-warmup-decay0.2": ("momentum-warmup", "B"),
    "momentum-warmup-decay0.4": ("momentum-warmup", "B"),
    "momentum-warmup-clip": ("momentum-warmup", "B"),
    "momentum-warmup-short-sequences": ("momentum-warmup", "B"),
    "momentum-warmup-b32": ("momentum-warmup", "B"),
    "momentum-warmup-batch-schedule": ("momentum-warmup", "B"),
    "momentum-warmup-decay0.1-batch-schedule": ("momentum-warmup-decay0.1", "C"),
    "momentum-warmup-decay0.1-1150-steps": ("momentum-warmup-decay0.1", "C"),
}


def test_whole_runs_decided_about_the_candidates() -> None:
    runs = {run["variant"]: run["final_loss"] for run in results("time_to_loss_choices")}
    losses = {name.removesuffix("whole").rstrip("-"): loss for name, loss in runs.items() if name.endswith("whole")}
    assert losses.keys() == {"", *WHOLE}
    for name, (base, letter) in WHOLE.items():
        assert f" | {losses[name]:.4f} | {losses[name] - losses[base]:+.4f} to {letter} | " in PAGE, name
    for name in runs:
        assert name.endswith("whole") or f" | {runs[name]:.4f} | " in PAGE, name


def test_ablations_of_short_runs() -> None:
    losses: dict[tuple[str, int, int], float] = {}
    for run in results("ablations"):
        losses[run["variant"], run["config"]["train"]["steps"], run["seed"]] = run["final_loss"]
    for name, steps in {(name, steps) for name, steps, _ in losses} - {("cautious-decay", 150)}:  # made again with 300
        base = base_of(name)
        apart = [loss - losses[base, steps, seed] for (n, s, seed), loss in losses.items() if (n, s) == (name, steps)]
        sign = "+" if mean(apart) > 0 else ""
        shown = sign + time_to_loss.mean(apart, ".4f") if len(apart) > 1 else f"{mean(apart):+.3f}"
        assert name == base or f" | {shown} |" in PAGE, (name, steps, shown)


def test_rates_at_half_and_at_twice() -> None:
    for run in results("time_to_loss_rates"):
        cells = [f"{run['losses'][step]:.3f}" for step in ("150", "600", "1100")]
        assert f" | {' | '.join(cells)} |" in PAGE
