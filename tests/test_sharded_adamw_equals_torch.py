"""Our optimizer against torch.optim.AdamW, fed the same gradients; rounding and clipping."""

import copy
from dataclasses import replace

import pytest
import tiny_run
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.optim import ShardedAdamW, round_stochastically, rounding_noise

CONFIG = replace(tiny_run.config().train, lr=6e-4, dtype="fp32")


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
        for name, p in model.named_parameters()
    }


def feed(optimizer: ShardedAdamW, given: dict[str, Tensor]) -> None:
    """A backward pass whose gradients are `given`."""
    optimizer.zero_gradients()
    optimizer.expect(last_micro_step=True)
    parameters = [pair for bucket in optimizer.buckets for pair in bucket.parameters]
    torch.stack([(p.float() * given[name]).sum() for name, p in parameters]).sum().backward()


def reference(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """torch's plain loop, with decay on 2-D weights only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def test_fifty_steps_equal_torch_adamw_with_clipping_and_a_changing_rate() -> None:
    ours, theirs = tiny_run.model(), tiny_run.model()
    optimizer, plain = ShardedAdamW(ours, CONFIG, tiny_run.alone()), reference(theirs, CONFIG)
    for step in range(50):
        rate = CONFIG.lr * (50 - step) / 50
        given = gradients(theirs, step)
        feed(optimizer, given)
        norm = float(optimizer.squared_norm()) ** 0.5
        scale = min(1.0, CONFIG.clip / norm)  # no epsilon, unlike torch's clipping
        optimizer.step(step, rate, scale)

        for name, parameter in theirs.named_parameters():
            parameter.grad = given[name].clone()
        exact = torch.nn.utils.get_total_norm([p.grad.double() for p in theirs.parameters()])
        assert norm == pytest.approx(float(exact), rel=1e-5)
        for parameter in theirs.parameters():
            parameter.grad.mul_(scale)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative(p.detach(), q.detach()) < 1e-6, name


def test_fp32_masters_behind_bf16_weights_follow_the_fp32_run() -> None:
    config = replace(CONFIG, dtype="bf16", master_weights=True)
    ours, exact = tiny_run.model(), tiny_run.model()
    optimizer = ShardedAdamW(ours, config, tiny_run.alone())
    plain = ShardedAdamW(exact, CONFIG, tiny_run.alone())
    for step in range(10):
        given = {name: g.bfloat16().float() for name, g in gradients(exact, step).items()}
        for each in (optimizer, plain):
            feed(each, given)
            each.step(step, CONFIG.lr, scale=1.0)
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, q.bfloat16()), name  # rounded once, at the end


def test_stochastic_rounding_keeps_updates_that_nearest_rounding_loses() -> None:
    """Steps of a five-thousandth of the weight: bf16 has 8 bits, rounding to nearest would stand still."""
    config = replace(CONFIG, dtype="bf16", master_weights=False, weight_decay=0.0)
    ours, exact = tiny_run.model(), tiny_run.model()
    optimizer = ShardedAdamW(ours, config, tiny_run.alone())
    plain = ShardedAdamW(exact, replace(CONFIG, weight_decay=0.0), tiny_run.alone())
    assert all("master" not in bucket.state for bucket in optimizer.buckets)
    start = copy.deepcopy(ours.blocks[0].ln_1.weight.detach().float())
    for step in range(100):
        given = {name: torch.ones_like(p) for name, p in exact.named_parameters()}
        for each in (optimizer, plain):
            feed(each, given)
            each.step(step, 2e-4, scale=1.0)
    moved = float((start - ours.blocks[0].ln_1.weight.detach().float()).mean())
    wanted = float((start - exact.blocks[0].ln_1.weight.detach()).mean())
    assert moved == pytest.approx(wanted, rel=0.1)


def test_stochastic_rounding_is_unbiased_and_repeats_with_its_seed() -> None:
    values = torch.tensor([1.0 + 0.3 * 2**-7, -2.0 - 0.8 * 2**-6, 1e-3, 0.0])
    many = values.repeat(100_000)
    rounded, again = (
        round_stochastically(many, rounding_noise(len(many), torch.Generator().manual_seed(1))) for _ in range(2)
    )
    assert torch.equal(rounded, again)
    gap = torch.tensor([2**-7, 2**-6, 2**-17, 0.0])  # between neighbouring bf16 values there
    assert ((rounded.float() - many).abs().view(-1, 4) <= gap).all()
    error = (rounded.double().view(-1, 4).mean(0) - values.double()).abs()
    assert (error <= 5 * 0.5 * gap / 100_000**0.5).all()  # five standard errors


def test_every_parameter_is_in_one_bucket_and_only_matrices_are_decayed() -> None:
    model = tiny_run.model()
    optimizer = ShardedAdamW(model, CONFIG, tiny_run.alone())
    names = [name for bucket in optimizer.buckets for name, _ in bucket.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for bucket in optimizer.buckets:
        matrices = sum(p.numel() for _, p in bucket.parameters if p.dim() >= 2)
        assert bucket.decayed == matrices
        assert [(s.start, s.stop, d) for s, d in bucket.segments()] == [
            (0, matrices, True),
            (matrices, bucket.size, False),
        ]
