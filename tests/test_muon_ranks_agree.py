"""Muon's updates: by hand, by the kernels, on any number of ranks, after a resume; in runs of the speed recipe."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import Tensor

from training.models import build_model
from training.muon import ShardedMuon, even_out, orthogonalize, plain_accumulate, plain_apply
from training.train import Trainer

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.tokens(tmp_path_factory.mktemp("tokens") / "shards")


def losses(folder: Path, shards: str, ranks: int, shard_ranks: int = 0, **train: object) -> list[float]:
    config = tiny_run.speedrun(val_every=0, **train)
    config = replace(config, machine=replace(config.machine, shard_ranks=shard_ranks))
    run = tiny_run.folder(folder / f"{ranks}-{shard_ranks}", config)
    done = tiny_run.train(run, shards, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return tiny_run.losses(run)


def largest_gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_a_step_is_the_momentum_s_orthogonal_part() -> None:
    """Against the definition, in fp64, with each matrix taken apart."""
    config = tiny_run.speedrun(steps=10, weight_decay=0.1, momentum=0.9, neuron_beta2=0.0)
    model = build_model(config.model)
    model.init_weights(seed=1)
    optimizer = ShardedMuon(model, config.train, tiny_run.alone())
    weight = model.blocks[1].mlp.c_fc.weight  # (4C, C)
    masters, mean = weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)
    for step in range(3):
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(step)
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.expect(last_micro_step=True)
        for bucket in optimizer.buckets:
            bucket.missing = 0
        optimizer.squared_norm()
        gradient = 0.5 * weight.grad.double()
        optimizer.step(step, lr=0.01, scale=0.5)
        mean = 0.9 * mean + 0.1 * gradient
        u, _, vt = torch.linalg.svd(0.1 * gradient + 0.9 * mean, full_matrices=False)
        update = 2.0 * (u @ vt)  # sqrt(4C / C)
        masters = masters - 0.01 * (update + 0.1 * masters * (update * masters > 0))
        change = (weight.detach().double() - masters).norm() / (0.01 * update.norm())
        assert change < 0.15 * (step + 1)  # the polynomials bring singular values near one, not to it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_their_plain_versions(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from training import kernels_muon

    gradient, momenta, updates = (torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(3))
    gradient, momenta, updates = gradient.to(DEVICE, dtype), momenta.to(DEVICE), updates.to(DEVICE, dtype)
    found, expected = ([gradient.clone(), momenta.clone(), updates.clone()] for _ in range(2))
    kernels_muon.accumulate(*found, 0.9, 0.5)
    plain_accumulate(*expected, 0.9, 0.5)
    near(found, expected)
    weights: list[list[Tensor]] = [[torch.zeros_like(gradient), momenta.clone(), updates.clone()] for _ in "ab"]
    kernels_muon.apply(*weights[0], 0.02, 0.1)
    plain_apply(*weights[1], 0.02, 0.1)
    near(*weights)


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_near_the_nearest_orthogonal_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    update = orthogonalize(matrices.to(dtype)).double()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.8 and values.max() < 1.2
    error = (update - u @ vt).norm() / (u @ vt).norm()
    assert error < 0.12, error
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def test_evened_out_neurons_move_alike_and_the_matrix_keeps_its_norm() -> None:
    directions = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 6)[:, None]
    neurons, before = torch.zeros(2, 6), directions.norm(dim=(1, 2))
    for _ in range(3):
        even = directions.clone()
        even_out(even, neurons, 0.9, dim=-1)
    torch.testing.assert_close(neurons, directions.square().mean(-1) * (1 - 0.9**3))
    torch.testing.assert_close(even.norm(dim=(1, 2)), before)
    torch.testing.assert_close(even.norm(dim=2) * 6**0.5, before[:, None].expand(2, 6))


@pytest.mark.slow
def test_ranks_give_the_same_losses_also_in_groups_and_with_a_block_left_over(shards: str, tmp_path: Path) -> None:
    one = losses(tmp_path, shards, 1)
    assert one[-1] < one[0] - 0.3
    for ranks, shard_ranks in ((2, 0), (4, 2)):
        assert largest_gap(one, losses(tmp_path, shards, ranks, shard_ranks)) < 1e-5


@pytest.mark.slow
def test_in_bf16_without_masters_they_agree_to_its_precision(shards: str, tmp_path: Path) -> None:
    settings = {"dtype": "bf16", "master_weights": False}
    assert largest_gap(losses(tmp_path, shards, 1, **settings), losses(tmp_path, shards, 2, **settings)) < 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_ends_in_the_same_bits(shards: str, tmp_path: Path, dtype: str) -> None:
    config = tiny_run.speedrun(steps=8, dtype=dtype, momentum_warmup_steps=6, weight_decay=0.1)
    whole, parts = (tiny_run.folder(tmp_path / name, config) for name in ("whole", "parts"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(parts, shards, until=3)
    tiny_run.steps(parts, shards)
    assert tiny_run.final_files(whole) == tiny_run.final_files(parts)
    assert tiny_run.losses(whole) == tiny_run.losses(parts)


def test_outliers_are_skipped_and_leave_no_trace(shards: str, tmp_path: Path) -> None:
    config = tiny_run.speedrun(steps=150, skip_loss_z=0.1, val_every=0)
    run = tiny_run.folder(tmp_path / "run", config)
    trainer = tiny_run.steps(run, shards, until=129)
    p, weights = trainer.progress, trainer.optimizer.buckets[1].weights
    while True:
        before, momenta, skipped = weights.clone(), trainer.optimizer.buckets[1].state["momentum"].clone(), p.skipped
        Trainer.step(trainer)
        if p.skipped > skipped:
            break
    assert torch.equal(before, weights) and torch.equal(momenta, trainer.optimizer.buckets[1].state["momentum"])


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_resumed_by_one_and_by_four(shards: str, tmp_path: Path) -> None:
    config = tiny_run.speedrun(steps=8, checkpoint_every=4, keep_checkpoints=9)
    two = tiny_run.folder(tmp_path / "two", config)
    assert tiny_run.train(two, shards, 2).returncode == 0
    for ranks in (1, 4):
        run = tmp_path / str(ranks)
        shutil.copytree(two, run)
        shutil.rmtree(run / "checkpoints/step_000008")
        assert tiny_run.train(str(run), shards, ranks).returncode == 0
        assert "written by 2 ranks" in (run / "train.log").read_text()
        assert largest_gap(tiny_run.losses(two), tiny_run.losses(str(run))) < 1e-5
