"""The ablations: each changes what it says, in a run beside its base's, and the table has the differences."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from tiny_pipeline import ROOT

from benchmarks import ablations
from benchmarks.ablations import VARIANTS
from benchmarks.time_to_loss import validation_losses
from benchmarks.token_corpora import Corpora
from training import modern, muon
from training.assemble import assemble
from training.modern import Modern
from training.train import Trainer

STEPS = 12
SMALL = [f"--steps={STEPS}", "--batch-tokens=512", "--micro-batch=4", "--val-tokens=256", "--recipe=modern:d1c128"]
SMALL += ["--set", "context=64", "train.dtype=fp32", "vocab=256", "lr=0.02", "embedding_lr=0.1", "head_lr=0.02"]


def parsed(*words: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablations", "--corpus", "x", *words])
        return ablations.arguments()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trained(runs: Path, name: str) -> list[float]:
    """A tiny run of the variant, made once: its training losses, and the validation loss behind it."""
    run, options = runs / name, parsed(*SMALL, "--only", name)
    if not run.exists():
        corpora = Corpora(tiny_run.tokens(runs / "tokens", size=4_000), "", "", 0, 0)
        job = next(job for job in ablations.jobs(options, corpora) if job.variant == name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablations, "EOT", 7)  # one that the tiny vocabulary has
            ablations.apply(name, patch.setattr)
            trainer = tiny_run.steps(tiny_run.folder(run, job.config), corpora.folder)
        assert trainer.progress.position == STEPS * 8  # sequences: as many for every variant
    return [*tiny_run.losses(str(run)), validation_losses(run)[str(STEPS)]]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != ablations.base_of(name)])
def test_a_variant_trains_another_way_than_its_base(runs: Path, name: str) -> None:
    here, there = trained(runs, name), trained(runs, ablations.base_of(name))
    assert max(abs(a - b) for a, b in zip(here, there, strict=True)) > 1e-5


def test_a_part_that_a_setting_takes_out_is_gone_and_the_rest_stays() -> None:
    jobs = ablations.jobs(parsed(*SMALL), Corpora("tokens", "a", "b", 1, 1))
    made = {job.variant: job.config.train for job in jobs}
    parts = {"no-normuon": "neuron_beta2", "no-decay": "weight_decay", "no-momentum-warmup": "momentum_warmup_steps"}
    for name, setting in (parts | {"no-cooldown": "cooldown"}).items():
        assert getattr(made["base"], setting) > 0
        assert made[name] == replace(made["base"], **{setting: 0})


def test_plain_decay_takes_from_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the update goes outwards, too; the decay is the recipe's own."""
    for name, expected in (("base", [1.8, -2.1, 2.0]), ("plain-decay", [1.8, -2.0, 1.9])):
        ablations.apply(name, monkeypatch.setattr)
        weights, updates = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
        muon._passes(torch.device("cpu")).apply(weights, weights, updates, 0.1, 0.5)
        torch.testing.assert_close(weights, torch.tensor(expected))


def test_the_plain_base_has_the_models_own_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Modern(tiny_run.MODERN_MODEL)
    model.init_weights(1)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokens = torch.arange(32).view(2, 16)
    monkeypatch.setattr(ablations, "LOGIT_ROWS", 8)
    found = []
    for loss in (model(tokens, tokens + 1), ablations.loss_in_parts(model, tokens, tokens + 1)):
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("words", [["--recipe", "demo"], ["--set", "optimizer=adamw"]])
def test_a_recipe_without_these_ingredients_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations", "--corpus", "tokens", *words])
    with pytest.raises(ValueError, match="is not the speed recipe with Muon"):
        ablations.jobs(ablations.arguments(), Corpora("tokens", "a", "b", 1, 1))


def test_the_plain_base_refuses_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    ablations.apply("base-plain", monkeypatch.setattr)
    with pytest.raises(ValueError, match="fp8 is the fused kernels'"):
        assemble(tiny_run.speedrun(fp8=True), tiny_run.alone(), None)


def test_a_logit_is_capped_no_more_and_positions_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Modern(tiny_run.MODERN_MODEL)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=9.0, generator=generator)
    torch.nn.init.normal_(model.get_parameter("blocks.0.attn.c_proj.weight"), generator=generator)
    tokens, turned = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])[:, None]
    assert not torch.allclose(model.logits(tokens)[:, -1], model.logits(turned)[:, -1], atol=0.01)
    ablations.apply("no-rotary", monkeypatch.setattr)
    torch.testing.assert_close(model.logits(tokens)[:, -1], model.logits(turned)[:, -1], atol=1e-3, rtol=0)
    assert model.logits(tokens).max() <= modern.CAP
    ablations.apply("no-cap", monkeypatch.setattr)
    assert model.logits(tokens).max() > modern.CAP


def test_queries_keys_and_values_as_one_matrix_are_orthogonal_together(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(2, 12 * 16**2, generator=torch.Generator().manual_seed(0))
    apart = flat.clone()
    muon.orthogonalize_blocks(apart, 16, torch.zeros(2, 0), 0.0)
    ablations.apply("qkv-as-one", monkeypatch.setattr)
    muon.orthogonalize_blocks(flat, 16, torch.zeros(2, 0), 0.0)
    qkv, unit = flat[:, : 3 * 16**2].view(2, 48, 16) / 3**0.5, torch.eye(16).expand(2, 16, 16)
    torch.testing.assert_close(qkv.mT @ qkv, unit, atol=0.2, rtol=0)
    assert torch.equal(flat[:, 3 * 16**2 :], apart[:, 3 * 16**2 :])


def test_a_row_begins_with_the_first_document_that_begins_in_it() -> None:
    shard = ablations.Aligned(np.array([1, 2, ablations.EOT, 4, 5, 6, 7, 8, 9, ablations.EOT, 11], np.uint16))
    assert shard[0:4].tolist() == [ablations.EOT, 4, 5, 6]
    assert shard[3:7].tolist() == [4, 5, 6, 7]  # none begins there
    assert shard[7:11].tolist() == [8, 9, ablations.EOT, 11]  # the shard ends too soon


def test_averaged_weights_are_the_mean_of_the_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after: list[torch.Tensor] = []
    take = Trainer.step

    def noted(self: Trainer) -> None:
        take(self)
        after.append(self.optimizer.buckets[0].weights.clone())

    monkeypatch.setattr(Trainer, "step", noted)
    ablations.apply("averaged", monkeypatch.setattr)
    run = tiny_run.folder(tmp_path / "run", tiny_run.speedrun(steps=12, cooldown=0.4))
    trainer = tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"))
    torch.testing.assert_close(trainer.optimizer.buckets[0].weights, torch.stack(after[9:]).mean(0))


def test_differences_are_of_runs_with_one_seed() -> None:
    config = {"model": {"channels": 384}, "train": {"steps": 600}}
    losses = {
        ("base-plain", 1): 4.0,
        ("base-plain", 2): 4.4,
        ("gelu", 1): 4.1,
        ("gelu", 2): 4.5,
        ("heads-of-64", 2): 4.3,
    }
    results = [{"variant": v, "seed": s, "final_loss": loss, "config": config} for (v, s), loss in losses.items()]
    failed = {"variant": "clip", "seed": 1, "failed": "exit status 1", "config": config}
    lines = ablations.table([*results, failed]).splitlines()[2:]
    assert lines[0].endswith("| 4.2000 ± 0.2000 | - |")
    assert lines[1] == "| gelu | GELU for squared ReLU | 4.3000 ± 0.2000 | +0.1000 ± 0.0000 |"
    assert lines[2] == "| heads-of-64 | heads=6 | 4.3000 | -0.1000 |"
    assert lines[3:] == ["| clip | clip=1 | - | - |", "  clip, seed 1: exit status 1"]


@pytest.mark.slow
def test_one_command_trains_variants_beside_their_base(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ablations", "--only", "batch-schedule", "--at-once=1", *SMALL]
    command += ["--steps=3", "--corpus", tiny_run.tokens(tmp_path / "tokens", size=4_000)]
    command += ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=tiny_run.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    base, variant = done.stdout.splitlines()[-2:]
    assert base.startswith("| base | the recipe | ") and base.endswith(" | - |")
    assert variant.startswith("| batch-schedule | ") and not variant.endswith(" 0.0000 |")
