"""1, 2 and 4 ranks train alike: the same batches, losses equal within rounding, state sharded among them."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from training.distributed import Group
from training.train import Stop, Trainer

STEPS = 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.tokens(tmp_path_factory.mktemp("tokens"))


def losses(
    path: Path, shards: str, ranks: int, shard_ranks: int = 0, overlap: bool = True, **train: Any
) -> list[float]:
    config = tiny_run.config(steps=STEPS, warmup_steps=10, val_every=0, **train)
    config = replace(config, machine=replace(config.machine, shard_ranks=shard_ranks, overlap=overlap))
    run = tiny_run.folder(path / f"{ranks}-{shard_ranks}{'' if overlap else '-apart'}", config)
    done = tiny_run.train(run, shards, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    found = tiny_run.losses(run)
    assert len(found) == STEPS and found[-1] < found[0] - 0.5
    return found


def largest_gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_two_ranks_and_one_give_the_same_losses(shards: str, tmp_path: Path) -> None:
    assert largest_gap(losses(tmp_path, shards, 1), losses(tmp_path, shards, 2)) < 1e-5


@pytest.mark.slow
def test_four_ranks_do_too_also_as_two_groups_of_two(shards: str, tmp_path: Path) -> None:
    one = losses(tmp_path, shards, 1)
    assert largest_gap(one, losses(tmp_path, shards, 4)) < 1e-5
    assert largest_gap(one, losses(tmp_path, shards, 4, shard_ranks=2)) < 1e-5
    assert largest_gap(one, losses(tmp_path, shards, 4, shard_ranks=1)) < 1e-5


@pytest.mark.slow
def test_overlapping_communication_changes_nothing(shards: str, tmp_path: Path) -> None:
    assert losses(tmp_path, shards, 2) == losses(tmp_path, shards, 2, overlap=False)


@pytest.mark.slow
@pytest.mark.parametrize("master_weights", [True, False])
def test_in_bf16_the_losses_agree_to_its_precision(shards: str, tmp_path: Path, master_weights: bool) -> None:
    settings = {"dtype": "bf16", "master_weights": master_weights, "lr": 1e-3}
    one = losses(tmp_path, shards, 1, **settings)
    for ranks in (2, 4):
        assert largest_gap(one, losses(tmp_path, shards, ranks, **settings)) < 2e-3


@pytest.mark.slow
def test_each_of_four_ranks_keeps_a_quarter_of_the_optimizer_s_state(shards: str, tmp_path: Path) -> None:
    def elements(ranks: int, shard_ranks: int) -> list[int]:
        losses(tmp_path, shards, ranks, shard_ranks)
        files = sorted(tmp_path.glob(f"{ranks}-{shard_ranks}/checkpoints/step_*/optimizer_*.safetensors"))
        return [sum(_sizes(file)) for file in files]

    (whole,) = elements(1, 0)
    quarters = elements(4, 0)
    assert len(quarters) == 4 and sum(quarters) == whole
    assert max(quarters) <= whole / 4 + 3 * 2 * 3  # three buckets, two tensors, padding
    assert len(elements(4, 2)) == 2


@pytest.mark.slow
def test_the_initial_weights_are_the_same_on_any_number_of_ranks(shards: str, tmp_path: Path) -> None:
    """After a step whose rate is too small to move a weight that is not 0."""
    config = tiny_run.config(steps=1, lr=1e-30, val_every=0)
    one, two = (tiny_run.folder(tmp_path / name, config) for name in ("one", "two"))
    tiny_run.steps(one, shards)
    assert tiny_run.train(two, shards, 2).returncode == 0
    weights, others = (load_file(f"{run}/checkpoints/step_000001/model.safetensors") for run in (one, two))
    assert all((weights[name] - others[name]).abs().max() < 1e-28 for name in weights)
    assert torch.equal(weights["wte.weight"], others["wte.weight"])


@dataclass(frozen=True)
class Counting(Group):
    """A group of one that counts what it would send."""

    sent: list[str] = field(default_factory=list)

    def reduce_scatter(self, output: Tensor, whole: Tensor) -> None:
        self.sent.append("gradients")

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        self.sent.append("weights")


def test_gradients_and_weights_travel_once_a_step_whatever_the_accumulation(shards: str, tmp_path: Path) -> None:
    for micro_batch in (8, 1):
        shard = Counting(0, 1, None)
        config = tiny_run.config(steps=3, val_every=0)
        config = replace(config, machine=replace(config.machine, micro_batch=micro_batch))
        world = replace(tiny_run.alone(), shard=shard)
        trainer = Trainer(config, tiny_run.folder(tmp_path / str(micro_batch), config), shards, world, Stop())
        assert trainer.micro_steps == 8 // micro_batch
        for _ in range(3):
            trainer.step()
        buckets = len(trainer.optimizer.buckets)
        assert shard.sent.count("gradients") == shard.sent.count("weights") == 3 * buckets


def _sizes(path: Path) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return [file.get_slice(name).get_shape()[0] for name in file.keys()]  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_of_two_ranks_is_resumed_by_one_and_by_four(shards: str, tmp_path: Path, dtype: str) -> None:
    config = tiny_run.config(steps=12, checkpoint_every=5, keep_checkpoints=9, dtype=dtype, lr=1e-3)
    two = tiny_run.folder(tmp_path / "two", config)
    assert tiny_run.train(two, shards, 2).returncode == 0
    for ranks in (1, 4):
        run = tmp_path / str(ranks)
        shutil.copytree(two, run)
        for step in (10, 12):
            shutil.rmtree(run / f"checkpoints/step_{step:06d}")
        assert tiny_run.train(str(run), shards, ranks).returncode == 0
        assert "written by 2 ranks" in (run / "train.log").read_text()
        assert largest_gap(tiny_run.losses(two), tiny_run.losses(str(run))) < (1e-5 if dtype == "fp32" else 2e-3)
