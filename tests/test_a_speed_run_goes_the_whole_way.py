"""`gpt2 run` with the speed recipe's model and Muon makes every stage, and what it makes is stock transformers'."""

from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import TINY_SETTINGS, gpt2
from transformers import AutoModelForCausalLM, NanoChatForCausalLM

from storage import records

SPEED = ("train.dtype=fp32", "val_batches=1", "health_every=2", "evals.hellaswag=")
SETTINGS = [*TINY_SETTINGS, *(word for setting in SPEED for word in ("--set", setting))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    chosen = ("modern:d1", "--corpus", "embedded", "--name", "speed")
    done = gpt2("run", *chosen, *SETTINGS, "--store", "store", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def run_folder(place: Path) -> Path:
    return place / "store/runs/speed"


def metrics(place: Path, key: str) -> dict[str, Any]:
    record = records.read_record(str(place / "store"), f"runs/speed{key}")
    assert record is not None
    return record.metrics


@pytest.mark.slow
def test_the_export_passes_its_gate_and_its_score_is_the_trainings_loss(place: Path) -> None:
    """The eval, by stock transformers on the exported folder, and the trainer look at the same shard."""
    model = AutoModelForCausalLM.from_pretrained(run_folder(place) / "export")
    assert isinstance(model, NanoChatForCausalLM)
    exported = metrics(place, "/export")
    assert exported["max_difference"] <= exported["tolerance"]
    scored = metrics(place, "/scores/validation_loss")["scores"]["loss"]
    assert scored["value"] == pytest.approx(metrics(place, "")["validation_loss_after"], abs=0.2)


@pytest.mark.slow
def test_the_card_and_the_report_say_what_it_is(place: Path) -> None:
    card = (run_folder(place) / "export/README.md").read_text()
    assert "- nanochat\n" in card and "A `nanochat` model of" in card and "| optimizer | muon |" in card
    assert "| momentum_warmup_steps | 1 |" in card and "| neuron_beta2 | 0.95 |" in card and "| fp8 | False |" in card
    assert (run_folder(place) / "report/stability-light.png").stat().st_size > 10_000


@pytest.mark.slow
def test_it_writes_text_and_no_llm_c_file(place: Path) -> None:
    sampled = gpt2("sample", "speed", "The", "--tokens", "5", "--store", "store", cwd=place)
    assert sampled.returncode == 0 and sampled.stdout.startswith("The"), sampled.stderr
    refused = gpt2("export", "speed", "--out", "speed.bin", "--store", "store", cwd=place)
    assert refused.returncode == 2 and "llm.c's format holds GPT-2 only" in refused.stderr, refused.stderr
