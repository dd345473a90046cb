"""The command that scores models: `gpt2 evals`, for runs, Hugging Face folders and models on the hub."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals import reference
from pipeline import runs
from pipeline.commands.compare import score_table
from pipeline.commands.options import JsonOption, StoreOption
from pipeline.commands.run import execute, named_stages, prepare, rows
from storage import models, objects
from storage.items import PUBLISHED
from storage.places import Places, places
from training.config import SUITES, EvalConfig, eval_settings

PUBLISHED_SUITES = ("hellaswag", "core")  # of which numbers of the released GPT-2 were published


def add_to(app: typer.Typer) -> None:
    app.command("evals")(evals)


def evals(
    names: Annotated[list[str], typer.Argument(metavar="RUN|FOLDER|HUB_NAME…", help="What to score.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Only this suite: " + ", ".join(SUITES) + ". (default: all that have data)"),
    ] = None,
    like: Annotated[
        str, typer.Option(metavar="RUN", help="Score on this run's validation shard and items, by its settings.")
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="For models: hellaswag=FILE|hub, harness=leaderboard-v1, core=FOLDER, dtype.",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="published", help="Say whether these models' published numbers come out here.")
    ] = "",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score runs anew and rewrite their reports, or score any model folder or hub model by the same code.

    A run's scores go with the run. Other models' are kept under models/ in the store and reused while model and
    questions are the same.

    Examples:

      gpt2 evals demo --suite completion_demo

      gpt2 evals gpt2 --like my-run

      gpt2 evals gpt2 gpt2-medium gpt2-large gpt2-xl --against published
    """
    place = places(store)
    for name in suite or []:
        if name not in SUITES:
            raise ValueError(f"--suite {name} is unknown: choose from {', '.join(SUITES)}")
    if against not in ("", "published"):
        raise ValueError(f"--against {against}: only `published` is known; `gpt2 compare` sets runs side by side")
    if not (like or against or settings) and all(runs.stored(place, name) for name in names):
        _score_runs(place, names, suite or [], as_json)
    else:
        _score_models(place, names, suite or [], like, eval_settings(settings or []), against, as_json)


def _score_runs(place: Places, names: list[str], suites: list[str], as_json: bool) -> None:
    if as_json and len(names) > 1:
        raise ValueError(f"--json answers for one run at a time, got {', '.join(names)}")
    stages = named_stages([*suites, "report"] if suites else ["evals"])
    for name in names:
        runs.check_inputs(place, name, runs.existing(place, name), stages)
    prepare(place)
    for name in names:
        execute(place, "evals_only", name, stages, as_json)


def _score_models(
    place: Places,
    names: list[str],
    suites: list[str],
    like: str,
    settings: dict[str, Any],
    against: str,
    as_json: bool,
) -> None:
    suites = suites or _suites(place, like, against, settings)
    settings = _defaults(place, like, settings, suites)
    check(place, names, suites, like, settings, against)
    prepare(place)
    from pipeline import execution
    from pipeline.terminal import Terminal, quiet_output

    answers = []
    with quiet_output() as console:
        quiet = Console(stderr=True, quiet=True) if as_json else console
        for name in names:
            quiet.print(f"[bold]gpt2[/bold] evals [bold]{escape(name)}[/bold] in {escape(place.store)}")
            terminal = Terminal(quiet)
            config = {"model": name, "suites": suites, "like": like, "settings": settings}
            run_id = execution.execute_model(place, terminal, config)
            answers.append(_answer(place, name, run_id, terminal, against))
            _print(quiet, name, answers[-1], against)
        if as_json:
            console.print_json(json.dumps({"models": answers}))


def _suites(place: Places, like: str, against: str, settings: dict[str, Any]) -> list[str]:
    """What a model is asked unless it is said: what the run was, or what there is data for."""
    if against:
        return [*PUBLISHED_SUITES]
    if not like:
        return [
            "hellaswag",
            *(suite for suite, key in (("eleuther", "harness"), ("core", "core")) if settings.get(key)),
        ]
    found = runs.existing(place, like).evals
    has_data = {"hellaswag": found.hellaswag or settings.get("hellaswag"), "core": found.core or settings.get("core")}
    return [suite for suite in SUITES if has_data.get(suite, True)]


def _defaults(place: Places, like: str, settings: dict[str, Any], suites: list[str]) -> dict[str, Any]:
    """HellaSwag's items from where the recipes have them and CORE's data in the home, where nothing else was said."""
    there = runs.existing(place, like).evals if like else EvalConfig()
    usual = {"hellaswag": PUBLISHED, "core": str(place.home / "core")}
    missing = {key: value for key, value in usual.items() if key in suites and not getattr(there, key)}
    return missing | settings


def check(
    place: Places, names: list[str], suites: list[str], like: str, settings: dict[str, Any], against: str
) -> None:
    """Refuse before anything starts: a model that is not there, a suite without data, numbers nobody published."""
    for suite in ("validation_loss", "completion_demo"):
        if suite in suites and not like:
            raise ValueError(f"{suite} reads a run's held-out text: name that run with --like RUN")
    if against:
        _check_published(names, suites)
    if like:
        runs.tokens_of(place, like)
    if "hellaswag" in suites:
        runs.check_items(settings.get("hellaswag", ""))
    if "eleuther" in suites:
        runs.check_tasks(settings.get("harness", ""))
    for name in names:
        if runs.stored(place, name) is None:
            try:
                models.resolve(name)
            except ValueError as error:
                known = ", ".join(runs.known_runs(place)) or "none"
                raise ValueError(f"{error}; the runs there are {known}") from error
        elif not objects.exists(objects.join(place.store, "runs", name, "export/record.json")):
            raise ValueError(f"run {name!r} has no exported model yet: `gpt2 run` makes it")


def _check_published(names: list[str], suites: list[str]) -> None:
    for name in names:
        model = reference.published_name(name)
        if model is None:
            known = ", ".join(n for n in reference.SIZES if n.startswith("gpt2"))
            raise ValueError(f"no numbers of {name} were published: --against published knows {known}")
        for suite in suites:
            if not reference.can_reproduce(model, suite):
                known = ", ".join(s for s in SUITES if reference.can_reproduce("gpt2", s))
                raise ValueError(f"no numbers of {name} in {suite} were published that could come out here: "
                                 f"--against published knows {known} of the released GPT-2")  # fmt: skip


def _answer(place: Places, name: str, run_id: str, terminal: Any, against: str) -> dict[str, Any]:
    """What came of one model: its scores by suite, and how they compare with published ones."""
    made = [m for m in terminal.made.values() if m.record.asset in SUITES]
    pages = {m.record.asset: objects.read_json(m.location) for m in made}
    answer: dict[str, Any] = {"model": name, "dagster_run": run_id, "outputs": rows(made)}
    if against:
        found = reference.against_published(pages, str(reference.published_name(name)))
        answer["published"] = [asdict(c) | {"reproduced": reference.reproduces(c)} for c in found]
        answer["reproduced"] = bool(found) and all(reference.reproduces(c) for c in found)
    return answer


def _print(console: Console, name: str, answer: dict[str, Any], against: str) -> None:
    table = Table("suite", "score", "value", "±", "items", header_style="bold")
    for output in answer["outputs"]:
        for score, found in output["metrics"]["scores"].items():
            error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            table.add_row(output["asset"], score, f"{found['value']:.4f}", error, f"{found['n']:,}")
    console.print(table)
    if against:
        found = [reference.Comparison(**{k: v for k, v in c.items() if k != "reproduced"}) for c in answer["published"]]
        console.print(score_table(name, found))
        good = sum(reference.reproduces(c) for c in found)
        verdict = "reproduces" if answer["reproduced"] else "[bold red]does not reproduce[/bold red]"
        console.print(
            f"this installation {verdict} the published numbers of {name}: {good} of {len(found)} lie within "
            f"{reference.REPRODUCED_WITHIN:g} standard error of the difference"
        )
