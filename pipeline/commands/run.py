"""Commands that make runs and show them: `gpt2 run`, `gpt2 ui`, `gpt2 env`."""

import json
import shlex
import shutil
import socket
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from assets.failures import STOPPED, Interrupted
from assets.run_config import check_documents, check_name, check_unchanged, config_url, keep_source, stored
from pipeline import runs
from pipeline.commands.options import JsonOption, StoreOption
from pipeline.terminal import near, results_table
from storage import objects, records
from storage.places import Places, places
from training.config import to_dict
from training.gpus import check_gpus


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("ui")(ui)
    app.command("env")(env)


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe; `gpt2 recipes` lists them. Or modern:d20: the speed recipe there.")
    ] = "demo",
    corpus: Annotated[
        str | None, typer.Option(help="embedded, a folder of parquet, s3://…, fineweb-edu-10B …: docs/data.md.")
    ] = None,
    files: Annotated[int | None, typer.Option(help="Of a corpus on the hub: only its first so many files.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The run's name. (default: the recipe's, with a suffix for changed settings)"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as steps=20."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this stage: data, training, evals, checks, or an asset's name. Evals are scored anew."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Ranks on this machine. (default: every GPU, or one CPU rank)")
    ] = None,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="Go on from a checkpoint of another trainer, torch or GPU.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run, from documents to report. Without a recipe: the demo, offline, on a CPU, in minutes.

    What is there with the same fingerprint is reused; an interrupted run goes on from its last checkpoint.

    Examples:

      gpt2 run

      gpt2 run gpt2-124m --corpus path/to/parquet --set steps=20 --set batch_tokens=4096

      gpt2 run demo --only evals
    """
    place = places(store)
    resume = ["resume=anyway"] if resume_anyway else []
    config = runs.configure(recipe, [*(settings or []), *resume], corpus, gpus, files)
    run_name = name or runs.default_name(config)
    config = runs.found_from_anywhere(config)
    check_name(run_name)
    check_unchanged(place, run_name, config)
    names = named_stages(only or [])
    runs.check_inputs(place, run_name, config, names)
    trains = not names or "trained_model" in names
    if trains:
        check_gpus(config.machine.gpus)
    source = runs.source(place, run_name, config.corpus)
    check_documents(place, run_name, source)
    runs.check_possible(place, config, source)
    if trains:
        runs.check_new(place, run_name, config, source)
    prepare(place)
    objects.publish_json(config_url(place, run_name), to_dict(config))
    keep_source(place, run_name, config.corpus, source)
    try:
        execute(place, "full_pipeline", run_name, names, as_json, runs.cpu_ranks(config) if trains else "")
    except (Interrupted, KeyboardInterrupt) as stopped:
        if config.machine.resume == "no" and config != stored(place, run_name):  # which training forgets at its start
            message = str(stopped) or STOPPED
            raise Interrupted(message.replace("same command", "same command without resume=no")) from stopped
        raise


def named_stages(only: list[str]) -> list[str]:
    """The assets that were named; empty for all of them."""
    if not only:
        return []
    from pipeline import execution  # Dagster takes a second to load, which most bad input need not wait for

    return execution.stages(only)


def prepare(place: Places) -> None:
    from pipeline import instance

    instance.prepare(place)


def execute(place: Places, job: str, run_name: str, names: list[str], as_json: bool, ranks: str = "") -> None:
    from pipeline import execution
    from pipeline.terminal import Terminal, quiet_output

    rescored = [n for n in names if n in execution.stages(["evals"])]
    with quiet_output() as console:
        quiet = Console(stderr=True, quiet=True) if as_json else console
        terminal = Terminal(quiet)
        quiet.print(f"[bold]gpt2[/bold] run [bold]{run_name}[/bold] in {escape(place.store)}")
        if ranks:
            quiet.print(f"  {ranks}")
        run_id = execution.execute(place, job, run_name, terminal, names, rescored)
        made = list(terminal.made.values())
        if as_json:
            console.print_json(json.dumps({"run": run_name, "dagster_run": run_id, "outputs": rows(made)}))
            return
        console.print()
        console.print(results_table(made))
        _epilogue(console, place, run_name)


def rows(made: list) -> list[dict]:  # type: ignore[type-arg]
    return [
        {
            "asset": m.record.asset,
            "key": m.record.key,
            "location": m.location,
            "reused": m.reused,
            "reason": m.reason,
            "seconds": round(m.seconds, 2),
            "bytes": m.record.bytes,
            "metrics": m.record.metrics,
        }
        for m in made
    ]


def _epilogue(console: Console, place: Places, run_name: str) -> None:
    """What a person wants to know next: did it learn, what does it write, where is the report, what now."""
    trained = records.read_record(place.store, f"runs/{run_name}")
    if trained:
        before, after = trained.metrics["validation_loss_before"], trained.metrics["validation_loss_after"]
        console.print(f"validation loss  {before:.3f} before → {after:.3f} after {trained.rows:,} steps")
        samples = objects.join(place.store, "runs", run_name, "samples.txt")
        if objects.exists(samples):
            text = objects.read_text(samples).rsplit("===", 1)[-1]
            console.print(f"sample           {' '.join(text.split())[:300]}", markup=False)
    page = objects.join(place.store, "runs", run_name, "report/index.html")
    if objects.exists(page):
        console.print(f"report           {near(page)}", soft_wrap=True, markup=False)
    program = "gpt2" if shutil.which("gpt2") else near(sys.argv[0])
    elsewhere = "" if place.store == places(environment={}).store else f" --store {shlex.quote(place.store)}"
    console.print("\nnext:")
    for command, what in (
        (f"evals {run_name}", "score the model again"),
        (f"lineage show {run_name}", "what it was made from"),
        (f'sample {run_name} "The"', "let it write"),
        ("ui", "look at the assets and runs in a browser"),
    ):
        console.print(f"  {escape(f'{program} {command}{elsewhere}'):<44} [dim]{what}[/dim]", soft_wrap=True)


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 3000,
    store: StoreOption = None,
) -> None:
    """Serve Dagster's web UI and its daemon on this machine until Ctrl-C, which also stops the runs launched there."""
    place = places(store)
    objects.check_writable(place.store)
    check_free(port)
    prepare(place)
    _add_partitions(place)
    sys.stderr.write(f"Dagster's UI: http://127.0.0.1:{port}  (store: {place.store})\n")
    from pipeline import page

    sys.exit(page.serve(port))


def check_free(port: int) -> None:
    """Raise ValueError where another program, or another page, has the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} can't be had ({error.strerror}): name another with --port") from error


def _add_partitions(place: Places) -> None:
    """Every run of the store, and the demo, so that there is something to materialize."""
    from pipeline import instance

    with instance.opened(place) as dagster:
        dagster.add_dynamic_partitions("run", ["demo", *runs.known_runs(place)])
        instance.sweep(dagster, place)


def env(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Print the variables with which Dagster's own commands see the same instance: eval "$(gpt2 env)"."""
    place = places(store)
    prepare(place)
    variables = place.variables()
    if as_json:
        print(json.dumps(variables, indent=2))
    else:
        for key, value in variables.items():
            print(f"export {key}={shlex.quote(value)}")
