"""Commands about recipes and models: `gpt2 recipes`, `gpt2 plan`, `gpt2 bench`, `gpt2 sample`, `gpt2 export`."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.table import Table

from assets.failures import ProcessFailed
from pipeline import runs
from pipeline.commands.options import JsonOption, StoreOption
from pipeline.terminal import console
from storage import models, objects, sources
from storage.places import Places, places
from training import plan as planning
from training import recipes
from training.config import TEMPERATURE, TOP_K, UNICORN, RunConfig, settable_keys, to_dict
from training.gpus import gpu_memory_gib, gpu_names


def add_to(app: typer.Typer) -> None:
    app.command("recipes")(list_recipes)
    app.command("plan")(plan)
    app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
    app.command("sample")(sample)
    app.command("export")(export)


def list_recipes(
    name: Annotated[str | None, typer.Argument(help="Show every setting of this recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes with parameters, tokens, FLOPs and what llm.c took, or every setting of one of them."""
    if name is not None:
        _print_settings(recipes.recipe(name), as_json)
        return
    rows = [_row(make()) for make in recipes.RECIPES.values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    titles = ("recipe", "parameters", "tokens", "steps × batch", "FLOPs", "llm.c on 8 H100", "it reported", "corpus")
    table = Table(*titles, header_style="bold")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['parameters'] / 1e6:,.1f}M",
            f"{row['tokens'] / 1e9:,.4g}B" if row["tokens"] >= 1e9 else f"{row['tokens'] / 1e6:,.3g}M",
            f"{row['steps']:,} × {row['batch_tokens']:,}",
            f"{row['flops']:.2e}",
            "" if row["llm_c_hours"] is None else f"{row['llm_c_hours']:,.1f} h, ${row['llm_c_dollars']:,.0f}",
            row["llm_c_reported"],
            row["corpus"],
        )
    console().print(table)
    how = f"the FLOPs at its measured MFU (46% for d12, 47% for d48), ${planning.LLM_C_PRICE:.0f} an hour"
    console().print(f"llm.c on 8 H100: {how}", style="dim")
    console().print("modern:d20, modern:d20c1024: the speed recipe for any layers and channels", style="dim")


def _row(config: RunConfig) -> dict[str, Any]:
    trained = config.model.layers >= 12 and config.model.family == "gpt2"  # by llm.c: not the demo, nor what it has not
    with_llm_c = planning.llm_c_cost(config) if trained else None
    return {
        "recipe": config.recipe,
        "parameters": config.model.parameters,
        "tokens": config.tokens,
        "steps": config.train.steps,
        "batch_tokens": config.train.batch_tokens,
        "flops": config.flops,
        "llm_c_hours": with_llm_c and with_llm_c.hours,
        "llm_c_dollars": with_llm_c and with_llm_c.dollars,
        "llm_c_reported": recipes.REPORTED.get(config.recipe, ""),
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
    console().print(table)


def plan(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe.")],
    gpu: Annotated[
        str,
        typer.Option(help="Which: " + ", ".join(planning.GPUS) + ", or here: this machine's, measured in seconds."),
    ] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="How many, on each of nnodes machines.")] = 8,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour, for all of them.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a recipe takes on given GPUs: micro-batch, memory by line, seconds a step, hours, dollars."""
    config = recipes.recipe(name, settings or [])
    config = replace(config, machine=replace(config.machine, gpus=gpus))
    runs.check_ranks(config)
    ranks = gpus * config.machine.nnodes
    device = planning.gpu(gpu, gpu_names(), gpu_memory_gib())
    planning.check(config, device)
    fitted = planning.fit(config, ranks, planning.limit(config, device.memory))
    known = device in planning.GPUS.values()
    if known:
        cost = planning.cost(config, fitted, device, ranks, price)
        origin = planning.mfu_origin(config, device)
    else:
        cost = planning.probed_cost(config, fitted, device, ranks, _probe(config, fitted), price)
        origin = "measured here, on the first layers"
    corpus_bytes = sources.expected_bytes(config.corpus)
    disk = runs.disk_bytes(config, corpus_bytes or 0)
    if as_json:
        shown = {"gpu": device.name, "measured": not known, "total": fitted.total, "rate_origin": origin, "disk": disk}
        print(json.dumps({**asdict(fitted), **shown, **asdict(cost)}, indent=2))
        return
    table = Table(show_header=False, title=f"{name} on {ranks} × {device.name}")
    _add_memory(table, config, device, fitted)
    more = f", and {runs.corpus_copies(config.corpus)} times the corpus's files" if corpus_bytes is None else ""
    table.add_row("disk", f"{disk / 2**30:,.1f} GiB{more}: {runs.on_disk(config)}")
    _add_time(table, config, ranks, cost, origin)
    console().print(table)


def _add_memory(table: Table, config: RunConfig, device: planning.Gpu, fitted: planning.Plan) -> None:
    table.add_row("micro-batch", f"{fitted.micro_batch} sequences × {fitted.micro_steps} micro-steps")
    table.add_row("recompute", str(fitted.recompute))
    table.add_row(
        "fp32 masters", "yes" if fitted.master_weights else "no: stochastic rounding (--set master_weights=false)"
    )
    for line, size in fitted.memory.items():
        table.add_row(f"memory: {line}", f"{size / 2**30:.1f} GiB")
    room = planning.limit(config, device.memory)
    there = f"{room:.1f} GiB (memory_gib)" if config.machine.memory_gib else f"{device.memory:.1f} GiB"
    table.add_row("memory a GPU", f"{fitted.total / 2**30:.1f} of {there}")


def _add_time(table: Table, config: RunConfig, ranks: int, cost: planning.Cost, origin: str) -> None:
    table.add_row("rate of a GPU", origin if cost.mfu is None else f"MFU {cost.mfu:.1%}, {origin}")
    if ranks > 1:
        lost = "communication is not counted"
        table.add_row(
            "rate of all", lost if cost.efficiency is None else f"{cost.efficiency:.1%} of {ranks} times one, on paper"
        )
    table.add_row("a step", _duration(cost.seconds_per_step))
    table.add_row(f"{config.train.steps:,} steps", _duration(3600 * cost.hours))
    if cost.dollars is not None:
        table.add_row("cost", f"${cost.dollars:,.0f}" if cost.dollars >= 100 else f"${cost.dollars:,.2f}")


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _probe(config: RunConfig, fitted: planning.Plan) -> float:
    """Seconds of a micro-step on this machine's GPU, measured by a process that holds torch."""
    machine = replace(config.machine, micro_batch=fitted.micro_batch, recompute=fitted.recompute)
    train = replace(config.train, master_weights=fitted.master_weights)
    text = json.dumps(to_dict(replace(config, machine=machine, train=train)))
    command = [sys.executable, "-m", "training.probe"]
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ProcessFailed(f"the probe ended with status {done.returncode}")
    return float(json.loads(done.stdout)["micro_step_seconds"])


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model such as d48.")],
) -> None:
    """Measure training on this machine: tokens/s, MFU, memory. Options (--micro-batch, --steps, --profile …) follow."""
    os.execv(sys.executable, [sys.executable, "-m", "training.bench", name, *context.args])


def sample(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER|HUB_NAME", help="A run, a model folder, or the hub's.")],
    prompt: Annotated[
        str, typer.Argument(help='Text to continue; "" starts a document.', show_default="GPT-2's unicorns")
    ] = UNICORN,
    tokens: Annotated[int, typer.Option(help="To write.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = TEMPERATURE,
    top_k: Annotated[int, typer.Option(help="Draw from the likeliest ones only; 0: from all.")] = TOP_K,
    top_p: Annotated[float, typer.Option(help="Of these, from the likeliest with this share of the mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    count: Annotated[int, typer.Option(help="Texts, made together.")] = 1,
    store: StoreOption = None,
) -> None:
    """Let a model write, token by token as they come."""
    options = {"tokens": tokens, "temperature": temperature, "top-k": top_k, "top-p": top_p, "seed": seed}
    arguments = [f"--{name}={value}" for name, value in (options | {"count": count}).items()]
    folder = _model_folder(places(store), model)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep; others may use the cores, too
    os.execv(sys.executable, [sys.executable, "-m", "training.sample", *arguments, "--", folder, prompt])


def _model_folder(place: Places, name: str) -> str:
    """A run's folder, or its export where its checkpoints lie on another machine; else a folder, or the hub's."""
    folder = place.local_folder(objects.join(place.store, "runs", name))
    if os.path.isdir(os.path.join(folder, "checkpoints")):
        return folder
    if runs.stored(place, name) is not None:
        return _staged_export(place, name)
    return models.fetch(models.resolve(name))


def _staged_export(place: Places, run: str) -> str:
    maker = runs.silent_maker(place)
    return maker.stage(maker.parent(f"runs/{run}/export", "hf_model"))


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run in the store.")],
    out: Annotated[
        str | None, typer.Option(help="A folder for Hugging Face's format, or a name ending in .bin for llm.c's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of --out: fp32 or bf16.")] = "fp32",
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Put the run's hf_model on the hub; needs HF_TOKEN.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Write a run's model in another dtype or in llm.c's format, or push its Hugging Face folder to the hub."""
    place = places(store)
    runs.existing(place, run)
    if not out and not push_to:
        folder = objects.join(place.store, "runs", run, "export")
        raise ValueError(f"say where to: --out FOLDER, --out MODEL.bin or --push-to OWNER/NAME ({folder} is there)")
    if push_to:
        models.check_push(push_to)
        print(_push(place, run, push_to))
    if out:
        _export(place, run, out, dtype)


def _push(place: Places, run: str, repo: str) -> str:
    from assets.card import write_card

    folder = _staged_export(place, run)
    write_card(runs.silent_maker(place), run)
    return models.push(folder, repo, f"Export of {run}")


def _export(place: Places, run: str, out: str, dtype: str) -> None:
    """The newest checkpoint is exported where it is; elsewhere the exported model serves."""
    shard = objects.join(place.store, runs.tokens_of(place, run))
    names = [s.path for s in objects.list_files(shard, "_val_000000.bin")]
    arguments = ["--out", out, "--dtype", dtype, "--tokens", objects.join(shard, names[0])]
    os.execv(sys.executable, [sys.executable, "-m", "training.export", _model_folder(place, run), *arguments])
