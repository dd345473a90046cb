"""What gives way where memory is short, in its order; time and money; and batches that do not divide."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_pipeline import ROOT, gpt2

from benchmarks import cost_model
from pipeline import runs
from pipeline.commands import model
from storage.places import places
from training import plan
from training.assemble import fitted
from training.bench import Bench
from training.config import RunConfig
from training.gpt2 import Block
from training.gpus import gpu_memory_gib
from training.probe import micro_step_seconds
from training.recipes import recipe

BIG = recipe("gpt2-1558m")
SCALING = json.loads(Path(__file__).parent.parent.joinpath("benchmarks/results/scaling_2_gpus.json").read_text())


def with_machine(config: RunConfig, **settings: int) -> RunConfig:
    return replace(config, machine=replace(config.machine, **settings))


def test_weights_gradients_and_optimizer_take_16_bytes_a_parameter_with_masters_and_12_without() -> None:
    lines = plan.memory(BIG, 1, 1, 0)
    fixed = lines["weights"] + lines["gradients"] + lines["optimizer state"]
    assert fixed / plan.GIB == pytest.approx(23.2, abs=0.05)
    without = replace(BIG, train=replace(BIG.train, master_weights=False))
    lines = plan.memory(without, 1, 1, 0)
    fixed = lines["weights"] + lines["gradients"] + lines["optimizer state"]
    assert fixed / plan.GIB == pytest.approx(17.4, abs=0.05)


def test_micro_batch_gives_way_before_recompute_and_recompute_before_the_masters() -> None:
    plans = [plan.fit(BIG, 1, gib) for gib in (139, 100, 60, 40, 27.5, 25.7, 22)]
    assert [p.master_weights for p in plans] == [True] * 6 + [False]
    order = [(p.master_weights, -p.recompute, p.micro_batch) for p in plans]
    assert order == sorted(order, reverse=True)
    assert plans[0].micro_batch > plans[2].micro_batch and plans[0].recompute == plans[2].recompute == 0
    assert plans[5].recompute > 0
    assert all(p.micro_batch * p.micro_steps * 1024 == BIG.train.batch_tokens for p in plans)


def test_more_gpus_share_the_optimizer_state() -> None:
    one, eight = plan.memory(BIG, 1, 16, 0), plan.memory(BIG, 8, 16, 0)
    assert eight["optimizer state"] == one["optimizer state"] / 8
    assert sum(eight.values()) < 50 * plan.GIB


def test_what_is_set_is_kept() -> None:
    chosen = plan.fit(with_machine(BIG, micro_batch=4, recompute=3), 8, 79)
    assert (chosen.micro_batch, chosen.recompute) == (4, 3)


def test_nothing_that_fits_is_an_error_with_the_least() -> None:
    with pytest.raises(ValueError, match=r"needs 1\d\.\d GiB a GPU at the least"):
        plan.fit(BIG, 1, 12)


def test_the_reproduced_run_takes_less_than_llm_c_did() -> None:
    cost = plan.cost(BIG, plan.fit(BIG, 8, 79), plan.gpu("h100"), 8, 28.0)
    assert 0.8 * 24.4 < cost.hours < 24.4 and cost.dollars == pytest.approx(cost.hours * 28)


@pytest.mark.parametrize(("card", "fp8"), [("h100", False), ("h100", True), ("h200", False), ("h200", True)])
def test_rates_are_those_measured_on_the_card(card: str, fp8: bool) -> None:
    """Those of benchmarks/; fp8 on an H100 by the H200's gain, as docs/cost.md has it."""
    config = replace(BIG, train=replace(BIG.train, fp8=fp8))
    device = plan.gpu(card)
    cost = plan.cost(config, plan.fit(config, 8, 79), device, 8, None)
    assert cost.mfu == pytest.approx(cost_model.measured(fp8)[card.upper()], abs=1e-3)
    assert cost.hours == pytest.approx(cost_model.reproduction(card.upper(), fp8), rel=0.005)
    small = [r["mfu"] for r in SCALING["speed"] if r["model"] == "d12" and r["ranks"] == 1]
    assert plan.MEASURED_MFU["H100 80GB"][0] == (768, pytest.approx(sum(small) / 2, abs=1e-3))


def test_gpus_that_talk_more_lose_more_as_docs_scaling_has_it() -> None:
    def efficiency(card: str, ranks: int, batch_tokens: int, shard_ranks: int = 0) -> float:
        config = with_machine(BIG, shard_ranks=shard_ranks)
        config = replace(config, train=replace(config.train, batch_tokens=batch_tokens))
        device = plan.gpu(card)
        return plan.cost(config, plan.fit(config, ranks, 60), device, ranks, None).efficiency or 0.0

    assert efficiency("h200", 1, 2**20) == 1
    assert efficiency("h200", 8, 2**20) == pytest.approx(0.997, abs=5e-4)
    assert efficiency("h200", 8, 2**17) == pytest.approx(0.975, abs=5e-4)
    assert efficiency("h200", 64, 2**20, shard_ranks=8) == pytest.approx(0.928, abs=1e-3)
    assert efficiency("h200", 64, 2**20) == pytest.approx(0.811, abs=1e-3)
    assert efficiency("rtx4090", 8, 2**17) < 0.95  # PCI Express in the place of NVLink


def test_a_plan_says_where_its_rate_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def said(card: str, *settings: str) -> str:
        model.plan("gpt2-124m", card, settings=[*settings])
        return capsys.readouterr().out

    assert "47.0%, measured on one H100 80GB" in said("h100")
    assert "50.2%, fp8's gain as on an H200" in said("h100", "fp8=true")
    assert "53.6%, measured on one H200" in said("h200", "fp8=true")
    assert "50.2%, as on an H200, not measured on this card" in said("a100")
    assert "as in bf16 with 768 channels or more: this run is slower" in said("h100", "train.dtype=fp32")
    assert "99.4% of 8 times one, on paper" in said("h200")


@pytest.mark.parametrize(
    ("name", "micro_batch", "fp8", "gib"),
    [("gpt2-1558m", 16, False, 57.34), ("gpt2-1558m", 16, True, 47.99)]
    + [("gpt2-124m", 64, False, 19.77), ("gpt2-124m", 64, True, 15.32)],
)
def test_memory_is_what_the_allocator_measured_on_an_h200(name: str, micro_batch: int, fp8: bool, gib: float) -> None:
    """Against the peaks in benchmarks/gpt2_training.json, within 5%."""
    config = recipe(name)
    lines = plan.memory(replace(config, train=replace(config.train, fp8=fp8)), 1, micro_batch, 0)
    assert (sum(lines.values()) - lines["CUDA"]) / plan.GIB == pytest.approx(gib, rel=0.05)


def planned(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> dict[str, Any]:
    """What `gpt2 plan --json` answers."""
    model.plan(*arguments, as_json=True, **options)
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_batch_that_a_run_refuses_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="does not divide into 8 ranks .* the nearest that do are 2048"):
        model.plan("demo")
    with pytest.raises(ValueError, match="does not divide into 3 ranks"):
        model.plan("gpt2-124m", gpus=3)
    with pytest.raises(ValueError, match="does not divide into 6 ranks"):
        model.plan("gpt2-124m", gpus=3, settings=["nnodes=2"])
    two_machines = planned(capsys, "gpt2-124m", gpus=8, settings=["nnodes=2"])
    assert two_machines["micro_batch"] * two_machines["micro_steps"] * 16 == 512


def test_a_price_below_nothing_is_refused(tmp_path: Path) -> None:
    done = gpt2("plan", "gpt2-124m", "--price", "-5", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "'--price'" in done.stderr


def test_a_limit_on_memory_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    whole = planned(capsys, "gpt2-124m")
    limited = planned(capsys, "gpt2-124m", settings=["memory_gib=10"])
    assert limited["total"] <= 10 * plan.GIB < whole["total"]
    assert limited["micro_batch"] < whole["micro_batch"]
    model.plan("gpt2-124m", settings=["memory_gib=10"])
    assert "of 10.0 GiB (memory_gib)" in capsys.readouterr().out
    assert plan.limit(with_machine(BIG, memory_gib=100), 79.2) == 79.2  # more than is there can't be taken


def test_shard_groups_that_the_trainer_refuses_are_not_planned() -> None:
    for shard_ranks in (16, 3):
        with pytest.raises(ValueError, match=f"shard_ranks={shard_ranks} does not divide the 8 ranks"):
            model.plan("gpt2-124m", settings=[f"shard_ranks={shard_ranks}"])


def test_a_short_time_is_shown_in_units_that_tell_it(capsys: pytest.CaptureFixture[str]) -> None:
    model.plan("demo", gpus=1, price=3.5)
    said = capsys.readouterr().out
    assert re.search(r"a step +│ 0\.\d+ ms", said) and re.search(r"220 steps +│ [1-9][\d.]* ms", said), said
    model.plan("gpt2-124m", "h200", settings=["steps=200"], price=28)
    said = capsys.readouterr().out
    assert re.search(r"a step +│ 0\.107 s", said) and re.search(r"200 steps +│ 21\.\d s", said), said
    assert "$0.17" in said
    model.plan("gpt2-124m", settings=["steps=2000"])
    assert re.search(r"2,000 steps +│ 3\.\d minutes", capsys.readouterr().out)


def test_a_plan_says_what_a_run_needs_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes that `gpt2 run` refuses a smaller disk for, the corpus included where its size is known."""
    config = recipe("gpt2-124m")
    needed = runs.disk_bytes(config, 28_500_000_000)
    assert needed == 28.5e9 * 3 + 3 * 14 * config.model.padded_parameters + 4 * config.model.parameters
    assert planned(capsys, "gpt2-124m")["disk"] == needed
    model.plan("gpt2-124m")
    assert f"{needed / plan.GIB:.1f} GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"this run needs about {runs.disk_bytes(config, 10**16) / plan.GIB:.1f} GiB"):
        runs.check_space(places(str(tmp_path)), config, 10**16)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.parquet").write_bytes(bytes(1000))
    folder = planned(capsys, "gpt2-124m", settings=[f"corpus={tmp_path}/texts"])["disk"]
    assert folder == runs.disk_bytes(config, 0) + 2 * 1000  # documents that are there are not fetched
    model.plan("gpt2-124m", settings=["corpus=fineweb-edu:CC-MAIN-2024-10"])
    assert "GiB, and 3 times the corpus's files" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_pages_say_what_the_plan_says_of_the_reproduction(capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(capsys, "gpt2-1558m", price=28)
    disk = f"{answer['disk'] / plan.GIB:.0f} GiB"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{answer['hours']:.0f} hours on 8 H100, ${answer['dollars']:.0f} at llm.c's price, and {disk}" in readme
    assert f"({disk} for `gpt2-1558m`" in (ROOT / "docs/running.md").read_text()


def test_checkpoints_that_are_never_deleted_need_their_place() -> None:
    config = recipe("gpt2-124m")
    more = recipe("gpt2-124m", ["keep_every=5000"])
    assert runs.disk_bytes(more, 0) - runs.disk_bytes(config, 0) == 3 * 14 * config.model.padded_parameters


def test_fp8_is_planned_for_hopper_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for card in ("a100", "b200", "l40s"):
        with pytest.raises(ValueError, match=r"fp8=true is for Hopper GPUs \(h100, h200\)"):
            model.plan("gpt2-124m", card, settings=["fp8=true"])
    fast, usual = (planned(capsys, "gpt2-124m", "h200", settings=[f"fp8={on}"]) for on in ("true", "false"))
    assert fast["hours"] < usual["hours"]


def test_a_gpu_that_is_in_no_table_must_be_this_machine_s() -> None:
    for name in ("tpu", "here"):
        with pytest.raises(ValueError, match="this machine has none that could be measured: choose from h100"):
            plan.gpu(name)
    found = plan.gpu("here", ["NVIDIA RTX 6000 Ada Generation"], 47.3)
    assert found == plan.gpu("rtx-6000", ["NVIDIA RTX 6000 Ada Generation"], 47.3)
    assert (found.name, found.memory, found.peak) == ("NVIDIA RTX 6000 Ada Generation", 47.3, 0.0)
    with pytest.raises(ValueError, match="unknown GPU 'v100'.*`here` for this machine's NVIDIA RTX 6000"):
        plan.gpu("v100", ["NVIDIA RTX 6000 Ada Generation"], 47.3)


@pytest.fixture
def seconds_a_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock of which each forward pass of a transformer block takes so long, and nothing else takes any time."""
    seconds, passed = [1.0], [0.0]

    def after(module: torch.nn.Module, *_: object) -> None:
        passed[0] += seconds[0] * isinstance(module, Block)

    monkeypatch.setattr(Bench, "now", lambda self: passed[0])
    hook = torch.nn.modules.module.register_module_forward_hook(after)
    yield seconds
    hook.remove()


@pytest.mark.parametrize("layers", [2, 4, 40])
def test_a_probe_measures_a_micro_step_of_all_layers(layers: int, seconds_a_block: list[float]) -> None:
    config = with_machine(tiny_run.config(), micro_batch=4)
    config = replace(config, model=replace(config.model, layers=layers))
    seconds = micro_step_seconds(config, tiny_run.alone())
    assert seconds == layers
    fitted = plan.Plan(4, 2, 0, True, {"weights": 1.0})
    cost = plan.probed_cost(config, fitted, plan.Gpu("new", 24.0, 0.0), 1, seconds, 3.6)
    assert cost.seconds_per_step == 2 * layers and cost.mfu is None
    assert cost.dollars == pytest.approx(3.6 * 6 * 2 * layers / 3600)


def test_a_probe_on_a_busy_gpu_guesses_nothing(seconds_a_block: list[float]) -> None:
    config = with_machine(tiny_run.config(), micro_batch=4)
    config = replace(config, model=replace(config.model, layers=12))
    seconds_a_block[0] = 0.0
    with pytest.raises(ValueError, match=r"no time of a layer could be measured \(3 layers took 0 ms"):
        micro_step_seconds(config, tiny_run.alone())


FAKE_SMI = """#!/bin/sh
case "$*" in
-L) echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)" ;;
*) echo "NVIDIA GeForce RTX 4090, 24564" ;;
esac
"""


@pytest.fixture
def one_24_gb_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers as a machine with that card does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(FAKE_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("one_24_gb_card")
def test_on_one_24_gb_card_the_run_gives_up_the_masters_says_so_and_is_another_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu_memory_gib() == pytest.approx(23.3, abs=0.1)
    config = runs.configure("gpt2-1558m", [], None, None)
    assert not config.train.master_weights
    assert "only without fp32 master weights" in capsys.readouterr().err
    assert runs.default_name(config).startswith("gpt2-1558m-")
    assert runs.configure("gpt2-350m", [], None, None).train.master_weights
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="needs .* GiB a GPU at the least"):
        runs.configure("gpt2-1558m", ["memory_gib=12"], None, None)


@pytest.mark.parametrize(("ranks", "micro_batch", "near"), [(3, 0, "96 and 144"), (1, 3, "96 and 144")])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(ranks: int, micro_batch: int, near: str) -> None:
    world = replace(tiny_run.alone(), size=ranks)
    with pytest.raises(ValueError, match=f"the nearest that do are {near}"):
        fitted(with_machine(tiny_run.config(), micro_batch=micro_batch), world)


def test_on_a_cpu_the_micro_batch_is_a_divisor_up_to_16() -> None:
    wide = tiny_run.config(batch_tokens=40 * 16)
    assert fitted(wide, tiny_run.alone()).machine.micro_batch == 10
    assert tiny_run.alone().device == torch.device("cpu")
