"""The recipes hold the numbers of llm.c's scripts, and every flag of its trainer has a setting."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
from tiny_pipeline import gpt2

from pipeline import launchpad
from training import config, model_config, plan, recipes

# llm.c's scripts: model, steps, batch, LR, final fraction, T, checkpoints every / kept / major every, skip z.
SCRIPTS = {
    "gpt2-124m": ("d12", 18_865, 524_288, 6e-4, 0.0, 1024, (5000, 2, 0), 0),
    "gpt2-350m": ("d24", 60_000, 524_288, 3e-4, 0.0, 1024, (2000, 2, 0), 0),
    "gpt2-774m": ("d36", 286_102, 524_288, 2.5e-4, 0.0, 1024, (4000, 2, 0), 0),
    "gpt2-1558m": ("d48", 32_000, 1_048_576, 6e-4, 0.1, 1024, (2000, 2, 0), 0),
    "gpt2-1558m-400b": ("d48", 400_000, 1_048_576, 6e-4, 0.1, 1024, (2000, 2, 0), 5),
    "gpt3-125m": ("gpt3:c768", 572_204, 524_288, 6e-4, 0.1, 2048, (10_000, 5, 50_000), 7),
}
MICRO_BATCHES = {"gpt2-124m": 64, "gpt2-350m": 64, "gpt2-774m": 32, "gpt2-1558m": 16, "gpt3-125m": 32}
FLAGS = "-i -j -o -v -m -s -g -h -b -t -d -r -z -w -c -k -l -q -u -sl -sg -n -nk -nm -x -y -e -ge -a".split()  # noqa: SIM905


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_recipe_has_the_numbers_of_its_script(name: str) -> None:
    made = recipes.recipe(name)
    model, steps, batch, lr, final, context, checkpoints, z = SCRIPTS[name]
    assert made.model == config.model_from_descriptor(model) and made.model.context == context
    train = made.train
    assert (train.steps, train.batch_tokens, train.lr, train.final_lr_fraction) == (steps, batch, lr, final)
    assert (train.checkpoint_every, train.keep_checkpoints, train.keep_every) == checkpoints
    assert train.skip_loss_z == train.skip_grad_z == z
    assert (train.warmup_steps, train.weight_decay, train.schedule) == (700, 0.1, "cosine")
    assert (train.beta1, train.beta2, train.eps, train.clip) == (0.9, 0.95, 1e-8, 1.0)
    assert (train.val_every, train.val_batches, train.sample_every, train.sample_tokens) == (250, 20, 0, 384)
    assert train.master_weights and made.machine.shard_ranks == 0 and made.machine.resume == "exact"


@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_on_eight_gpus_of_80_gb_the_plan_takes_llm_cs_micro_batch(name: str) -> None:
    fitted = plan.fit(recipes.recipe(name), 8, plan.SHARE_OF_MEMORY * plan.gpu("a100").memory)
    assert (fitted.micro_batch, fitted.recompute, fitted.master_weights) == (MICRO_BATCHES[name], 0, True)


def test_every_flag_of_llm_c_is_named_beside_its_setting() -> None:
    text = Path(config.__file__).read_text() + Path(model_config.__file__).read_text()
    named = set(re.findall(r"(?<![\w-])-[a-z]{1,2}(?![\w-])", text))
    assert [flag for flag in FLAGS if flag not in named] == []


def test_every_setting_says_what_it_is() -> None:
    """In words beside llm.c's flag: the launchpad shows them."""
    hints = typing.get_type_hints(config.RunConfig).values()
    for section in filter(dataclasses.is_dataclass, hints):
        assert isinstance(section, type)
        said = launchpad.comments(section)
        for field in dataclasses.fields(section):
            words = re.findall("[a-zA-Z]{2,}", re.sub(r"^(-\w+, )*-\w+", "", said.get(field.name, "")))
            assert len(words) >= 3, f"{section.__name__}.{field.name}: {said.get(field.name)}"


@pytest.mark.parametrize(("descriptor", "channels", "layers"), [("d24", 1024, 24), ("gpt3:c1536", 1536, 24)])
def test_a_model_can_be_set_by_llm_cs_descriptor(descriptor: str, channels: int, layers: int) -> None:
    made = config.override(recipes.recipe("gpt2-124m"), [f"model={descriptor}"])
    assert (made.model.channels, made.model.layers) == (channels, layers)
    with pytest.raises(ValueError, match="unknown model"):
        config.override(made, ["model=12"])


def test_the_list_says_what_llm_c_took(tmp_path: Path) -> None:
    rows = {row["recipe"]: row for row in json.loads(gpt2("recipes", "--json", cwd=tmp_path).stdout)}
    assert rows["gpt2-1558m"]["llm_c_hours"] == pytest.approx(32_000 * 2.75 / 3600, rel=0.01)
    assert rows["gpt2-1558m"]["llm_c_reported"] == "24 h, $672 on 8 H100"
    assert all(
        row["llm_c_dollars"] == pytest.approx(28 * row["llm_c_hours"]) for name, row in rows.items() if "gpt" in name
    )
    shown = gpt2("recipes", cwd=tmp_path).stdout
    assert "135 h, $2,000 on 8 A100" in shown and "18,865 × 524,288" in shown
