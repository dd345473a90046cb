"""The figures of a training's validation, against transformers, and the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from storage.shards import Choice, write_choices
from training.loader import validation_loader
from training.validation import choice_accuracy, mean_loss
from training.weights import to_huggingface

CPU = torch.device("cpu")


def items(count: int = 25) -> list[Choice]:
    """Endings of different lengths; the right one goes on as the walk does, mostly."""
    random = np.random.default_rng(1)
    made = []
    for index in range(count):
        start = int(random.integers(20, 200))
        context = tuple(range(start, start + int(random.integers(1, 5))))
        wrong = [tuple(random.integers(0, 256, random.integers(1, 6)).tolist()) for _ in range(3)]
        right = tuple(range(context[-1] + 1, context[-1] + 1 + int(random.integers(1, 6))))
        made.append(Choice(context, (*wrong[: index % 4], right, *wrong[index % 4 :]), index % 4))
    return made


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=256))
    ours = tiny_run.model()
    model.load_state_dict(to_huggingface(ours.state_dict(), ours.config))
    return model.eval()


@torch.no_grad()
def test_accuracy_chooses_the_ending_of_the_lowest_mean_loss(theirs: GPT2LMHeadModel) -> None:
    right = 0
    for item in items():
        losses = []
        for ending in item.endings:
            text = torch.tensor([[*item.context, *ending]])
            labels = text.clone()
            labels[:, : len(item.context)] = -100
            losses.append(float(theirs(text, labels=labels).loss))
        right += losses.index(min(losses)) == item.label
    assert choice_accuracy(tiny_run.model(), items(), tiny_run.alone()) == right / 25


@torch.no_grad()
def test_loss_is_the_mean_over_the_split_s_first_sequences(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    load = validation_loader(tiny_run.tokens(tmp_path / "tokens"), 16, CPU)
    found = mean_loss(tiny_run.model(), load, sequences=7, micro_batch=3, world=tiny_run.alone())
    tokens, targets = load(range(7))
    logits = theirs(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found == pytest.approx(float(expected), abs=1e-5)
    everything = mean_loss(tiny_run.model(), load, 10_000, 4, tiny_run.alone())
    assert everything == mean_loss(tiny_run.model(), load, load.order.sequences_per_epoch, 4, tiny_run.alone())


@pytest.mark.slow
def test_it_is_written_on_its_interval_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    config = tiny_run.config(steps=4, val_every=2, hellaswag=True, sample_every=2)
    shards, file = tiny_run.tokens(tmp_path / "tokens"), str(tmp_path / "items.bin")
    write_choices(file, items())
    logs = []
    for ranks in (1, 2):
        run = tiny_run.folder(tmp_path / str(ranks), config)
        done = tiny_run.train(run, shards, ranks, f"--items={file}")
        assert done.returncode == 0, done.stderr[-3000:]
        lines = Path(run, "main.log").read_text().splitlines()
        logs.append([line for line in lines if " eval:" in line or " tel:" in line])
        assert Path(run, "samples.txt").read_text().count("=== step ") == 2
    assert [line.split()[0] for line in logs[0]] == ["s:0", "s:0", "s:2", "s:2", "s:4", "s:4"]
    assert [line for line in logs[0] if "eval" in line] == [line for line in logs[1] if "eval" in line]


def test_every_forward_pass_of_the_accuracy_has_one_shape() -> None:
    """Of items of any length, and where their number is no multiple of what is scored at once."""
    model, shapes = tiny_run.model(), set()
    model.wte.register_forward_hook(lambda _, given, out: shapes.add(tuple(given[0].shape)))
    choice_accuracy(model, items(25), tiny_run.alone())
    assert shapes == {(4, 16)}


def test_hellaswag_without_items_is_refused(tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(hellaswag=True))
    with pytest.raises(ValueError, match="--items"):
        tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"))
