"""The schedules at every step: warm-up as llm.c's, what follows it against transformers' own schedules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from training.config import TrainConfig
from training.schedule import learning_rate, momentum

STEPS, WARMUP, LR = 500, 70, 6e-4
# What llm.c's `get_learning_rate` prints, compiled: lr 6e-4, warm-up 700, 32,000 steps, final share 0.1.
LLM_C_RATES = {
    0: 8.571428793e-07,
    1: 1.714285759e-06,
    349: 3.000000142e-04,
    699: 6.000000285e-04,
    700: 6.000000285e-04,
    701: 6.000000285e-04,
    5000: 5.752412253e-04,
    16350: 3.299999807e-04,
    25000: 1.239442499e-04,
    31000: 6.135888543e-05,
    31999: 6.000000212e-05,
}


def config(schedule: Any, final: float) -> TrainConfig:
    return TrainConfig(
        steps=STEPS, batch_tokens=1, lr=LR, warmup_steps=WARMUP, final_lr_fraction=final, schedule=schedule
    )


def reference(schedule: str, final: float) -> list[float]:
    """transformers' rates, whose warm-up starts at 0 instead of at one step's share."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    sizes = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
    made = {
        "cosine": lambda: get_cosine_with_min_lr_schedule_with_warmup(optimizer, **sizes, min_lr_rate=final),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, **sizes),
        "wsd": lambda: get_wsd_schedule(
            optimizer, **sizes, num_decay_steps=STEPS // 5, decay_type="1-sqrt", min_lr_ratio=final
        ),
        "trapezoid": lambda: get_wsd_schedule(
            optimizer, **sizes, num_decay_steps=2 * STEPS // 5, decay_type="linear", min_lr_ratio=final
        ),
    }[schedule]()
    rates = []
    for _ in range(STEPS):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


SHAPES = [("linear", 0.0), *((shape, final) for shape in ("cosine", "wsd", "trapezoid") for final in (0.1, 0.0))]


@pytest.mark.parametrize(("schedule", "final"), SHAPES)
def test_after_the_warm_up_it_is_transformers_schedule(schedule: str, final: float) -> None:
    expected = reference(schedule, final)
    for step in range(WARMUP, STEPS):
        assert learning_rate(config(schedule, final), step) == pytest.approx(expected[step], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "trapezoid"])
def test_warm_up_rises_from_one_step_s_share_to_the_maximum(schedule: str) -> None:
    for step in range(WARMUP):
        assert learning_rate(config(schedule, 0.1), step) == pytest.approx(LR * (step + 1) / WARMUP, rel=1e-12)


def test_linear_ends_above_its_final_share_by_one_step() -> None:
    slope = (LR - 0.1 * LR) / (STEPS - WARMUP)
    assert learning_rate(config("linear", 0.1), STEPS - 1) == pytest.approx(0.1 * LR + slope)


def test_constant_has_no_warm_up() -> None:
    assert {learning_rate(config("constant", 0.1), step) for step in range(STEPS)} == {LR}


def test_cosine_gives_the_numbers_that_llm_c_prints() -> None:
    run = TrainConfig(steps=32_000, batch_tokens=1, lr=6e-4)
    for step, rate in LLM_C_RATES.items():
        assert learning_rate(run, step) == pytest.approx(rate, rel=3e-6)


def test_the_momentum_rises_as_modded_nanogpts() -> None:
    run = TrainConfig(steps=STEPS, batch_tokens=1, lr=LR, momentum=0.95, momentum_warmup_steps=300)
    for step in range(STEPS):
        share = min(step / 300, 1)  # as it is written there
        assert momentum(run, step) == pytest.approx((1 - share) * 0.85 + share * 0.95)
    assert momentum(replace(run, momentum_warmup_steps=0), 0) == 0.95
