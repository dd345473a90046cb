"""Every number of the speed recipe follows from the model's size: docs/recipe.md's tables, and sizes without a name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_pipeline import ROOT, gpt2

from pipeline import launchpad, runs
from training import recipes
from training.config import to_dict
from training.recipes import recipe

SPEED = ("speedrun-124m", "speedrun-350m", "speedrun-1558m")


def rows(name: str) -> list[list[float]]:
    """The numbers in the lines of docs/recipe.md's tables that are about a recipe."""
    lines = (ROOT / "docs/recipe.md").read_text().splitlines()
    cells = [line.split("|")[2:-1] for line in lines if line.startswith(f"| `{name}` |")]
    return [[float(re.sub("[,MB ]", "", cell)) for cell in row] for row in cells]


@pytest.mark.parametrize("name", SPEED)
def test_a_recipe_has_the_numbers_of_the_documentation(name: str) -> None:
    made = recipe(name)
    model, train = made.model, made.train
    sizes, rates = rows(name)
    millions = [model.parameters / 1e6, model.block_matrices / 1e6]
    # to the digit that is shown
    assert sizes[:5] == pytest.approx([model.layers, model.channels, model.heads, *millions], abs=0.05)
    expected = [made.tokens / 1e9, train.batch_tokens, train.steps, train.lr, train.embedding_lr, train.head_lr]
    assert rates == pytest.approx([*expected, train.weight_decay], rel=1e-3)
    assert (train.optimizer, train.schedule, train.beta1, train.momentum) == ("muon", "trapezoid", 0.8, 0.95)
    assert train.clip == train.warmup_steps == train.final_lr_fraction == 0
    assert train.momentum_warmup_steps == 300


def test_a_size_without_a_name_has_its_rules() -> None:
    made = recipe("modern:d20")
    assert (made.model.layers, made.model.channels, made.recipe) == (20, 1280, "modern:d20")
    assert made.tokens == pytest.approx(12 * (12 * 20 * 1280**2 + 50257 * 1280), rel=1e-4)
    assert made.train.embedding_lr == pytest.approx(0.3 * 2**0.5 * (768 / 1280) ** 0.5)  # at twice the batch
    assert recipe("modern:d20c1024").model.channels == 1024
    assert runs.default_name(made) == "modern-d20"


@pytest.mark.parametrize("setting", ["model=modern:d20", "layers=20 channels=1280 heads=10"])
def test_another_model_of_a_speed_recipe_has_its_own_numbers(setting: str) -> None:
    assert recipe("speedrun-124m", setting.split()).train == recipe("modern:d20").train


def test_another_batch_moves_the_rates_and_what_is_set_wins() -> None:
    base, made = recipe("speedrun-124m").train, recipe("speedrun-124m", ["batch_tokens=524288", "head_lr=0.5"]).train
    assert made.lr == pytest.approx(2 * base.lr) and made.embedding_lr == pytest.approx(2 * base.embedding_lr)
    assert made.head_lr == 0.5 and made.steps == pytest.approx(base.steps / 4, abs=1)
    assert recipe("speedrun-124m", ["model=modern:d20", "steps=7", "lr=0.1"]).train.steps == 7
    assert recipe("speedrun-124m", ["model=modern:d20", "train.batch_tokens=131072"]).train.batch_tokens == 131_072


def test_other_steps_move_the_decay_and_the_momentums_warm_up() -> None:
    base = recipe("speedrun-124m", ["batch_tokens=65536", "steps=1200"]).train
    assert base.lr * base.weight_decay * base.steps == pytest.approx(3) and base.momentum_warmup_steps == 200
    half = recipe("speedrun-124m", ["batch_tokens=65536", "train.steps=600"]).train
    assert (half.lr, half.weight_decay, half.momentum_warmup_steps) == (base.lr, 0.2, 100)
    made = recipe("speedrun-124m", ["steps=20", "weight_decay=0", "momentum_warmup_steps=7"]).train
    assert (made.steps, made.weight_decay, made.momentum_warmup_steps) == (20, 0, 7)
    for words in ("steps=0", "steps=-5", "batch_tokens=0", "batch_tokens=-1024"):
        with pytest.raises(ValueError, match=f"{words} must be at least 1"):
            recipe("speedrun-124m", [words])
    with pytest.raises(ValueError, match="lr=-1.0 must be above 0"):
        recipe("speedrun-124m", ["lr=-1"])


def test_another_rate_of_muon_moves_the_decay_alone() -> None:
    base, slower = recipe("speedrun-124m").train, recipe("speedrun-124m", ["train.lr=0.01"]).train
    assert slower.weight_decay == pytest.approx(3 / (0.01 * base.steps))
    assert replace(slower, lr=base.lr, weight_decay=base.weight_decay) == base
    assert recipe("speedrun-124m", ["lr=1e-4"]).train.weight_decay == 0.2
    assert recipe("speedrun-124m", ["lr=0.01", "weight_decay=0.1"]).train.weight_decay == 0.1


def test_what_the_launchpad_leaves_out_follows_and_what_it_says_stays() -> None:
    made = launchpad._config({"recipe": "speedrun-124m", "train": {"steps": 600, "val_every": 50}})
    assert made == recipe("speedrun-124m", ["steps=600", "val_every=50"])
    whole = recipe("speedrun-124m")
    filled = {"recipe": "speedrun-124m", "model": to_dict(whole.model), "train": to_dict(whole.train) | {"steps": 600}}
    assert launchpad._config(filled) == replace(whole, train=replace(whole.train, steps=600))


def test_other_recipes_and_models_keep_the_numbers_that_they_have() -> None:
    assert recipe("gpt2-124m", ["batch_tokens=131072"]).train.lr == recipe("gpt2-124m").train.lr
    adamw = recipe("speedrun-124m", ["model=d12", "optimizer=adamw", "lr=6e-4"])
    assert (adamw.model.family, adamw.train.steps) == ("gpt2", recipe("speedrun-124m").train.steps)
    assert all(recipe(name) == made() for name, made in recipes.RECIPES.items())


def test_commands_take_such_a_size(tmp_path: Path) -> None:
    done = gpt2("plan", "modern:d20", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["micro_batch"] > 1, done.stderr
    assert "modern:d20" in gpt2("recipes", cwd=tmp_path).stdout
    assert "unknown model 'modern:20'" in gpt2("recipes", "modern:20", cwd=tmp_path).stderr
