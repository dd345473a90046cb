"""What are the learning rate and Muon's momentum at each step? llm.c's four schedules (`schedulers.h`) and the
trapezoid: warm-up, constant, linear to the final fraction. Pure functions.
"""

import math

from training.config import TrainConfig

WSD_DECAY_FROM = 0.8  # share of the run after which `wsd` decays
FIRST_MOMENTUM = 0.85  # before a momentum warm-up


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of update `step` (the first is 0). `constant` has no warm-up."""
    if config.schedule == "constant":
        return config.lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    final = config.lr * config.final_lr_fraction
    return final + (config.lr - final) * _SHAPES[config.schedule](config, step)


def momentum(config: TrainConfig, step: int) -> float:
    """Muon's at update `step`."""
    share = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum - (1.0 - share) * (config.momentum - FIRST_MOMENTUM)


def _cosine(config: TrainConfig, step: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _progress(config, step, config.warmup_steps)))


def _linear(config: TrainConfig, step: int) -> float:
    return 1.0 - _progress(config, step, config.warmup_steps)


def _wsd(config: TrainConfig, step: int) -> float:
    decay_from = int(WSD_DECAY_FROM * config.steps)
    return 1.0 if step < decay_from else 1.0 - math.sqrt(_progress(config, step, decay_from))


def _progress(config: TrainConfig, step: int, start: int) -> float:
    """How far `step` is from `start` (0) to the end of the run (1)."""
    return (step - start) / (config.steps - start)


def _trapezoid(config: TrainConfig, step: int) -> float:
    decay_from = config.steps - round(config.cooldown * config.steps)
    return 1.0 if step < decay_from else 1.0 - _progress(config, step, decay_from)


_SHAPES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "trapezoid": _trapezoid}
