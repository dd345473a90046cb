"""Commands that ask about recipes and models: `gpt2 recipes`, `gpt2 sample`."""

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.commands.run import JsonOption, StoreOption
from storage import objects
from storage.places import places
from training import recipes
from training.config import RunConfig, settable_keys


def add_to(app: typer.Typer) -> None:
    app.command("recipes")(list_recipes)
    app.command("sample", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sample)


def list_recipes(
    name: Annotated[str | None, typer.Argument(help="Show every setting of this recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes with parameters, tokens and FLOPs, or every setting of one of them."""
    if name is not None:
        _print_settings(recipes.recipe(name), as_json)
        return
    rows = [_row(make()) for make in recipes.RECIPES.values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("recipe", "parameters", "tokens", "steps × batch", "FLOPs", "corpus", header_style="bold")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['parameters'] / 1e6:,.1f}M",
            f"{row['tokens'] / 1e9:,.4g}B",
            f"{row['steps']:,} × {row['batch_tokens']:,}",
            f"{row['flops']:.2e}",
            row["corpus"],
        )
    Console().print(table)


def _row(config: RunConfig) -> dict[str, Any]:
    return {
        "recipe": config.recipe,
        "parameters": config.model.parameters,
        "tokens": config.tokens,
        "steps": config.train.steps,
        "batch_tokens": config.train.batch_tokens,
        "flops": config.flops,
        "corpus": config.corpus,
    }


def _print_settings(config: RunConfig, as_json: bool) -> None:
    settings = settable_keys(config)
    if as_json:
        print(json.dumps(settings, indent=2))
        return
    table = Table("setting", "value", header_style="bold", title=f"--set KEY=VALUE for {config.recipe}")
    for key, value in settings.items():
        table.add_row(key, str(value))
    Console().print(table)


def sample(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run in the store, or a model folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    store: StoreOption = None,
) -> None:
    """Let a model write. More options (--tokens, --temperature, --top-k, --top-p, --seed) go to the sampler."""
    place = places(store)
    folder = place.local_folder(objects.join(place.store, "runs", model))
    target = folder if os.path.isdir(folder) else model
    if not os.path.isdir(target):
        raise ValueError(f"no run {model!r} in {place.store} and no such folder: `gpt2 run` makes a run")
    os.execv(sys.executable, [sys.executable, "-m", "training.sample", target, prompt, *context.args])
