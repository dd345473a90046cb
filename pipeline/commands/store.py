"""Commands that look after a store: `gpt2 store status | verify | gc`."""

import contextlib
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pipeline import runs
from pipeline.commands.options import JsonOption, StoreOption
from pipeline.terminal import console, size
from storage import garbage, integrity, objects
from storage.contents import FOLDERS, UNREADABLE
from storage.garbage import Garbage
from storage.integrity import Problem
from storage.places import Places, places

app = typer.Typer(help="Is what lies in the store fresh, whole and needed?", no_args_is_help=True)

MOST_DEPENDENTS = 6  # that a line of `verify` names


@app.command()
def status(
    run: Annotated[list[str] | None, typer.Argument(metavar="RUN…", help="Runs in the store. (default: all)")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say of each stage whether it is fresh, stale and why, or missing: what `gpt2 run` would make anew."""
    from assets.freshness import stages

    place = _existing(store)
    for name in run or ():
        runs.existing(place, name)
    names = run or [*runs.readable_runs(place)]
    maker = runs.silent_maker(place)
    found = [stage for name in names for stage in stages(maker, name)]
    if as_json:
        print(json.dumps([asdict(stage) for stage in found], indent=2))
        return
    table = Table("run", "stage", "", "why", "output", header_style="bold")
    colours = {"fresh": "green", "stale": "yellow", "missing": "red"}
    for s in found:
        table.add_row(s.run, s.stage, f"[{colours[s.state]}]{s.state}[/]", escape(s.reason), s.key)
    console().print(table if found else "no run is in the store")


@app.command()
def verify(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read every file and hold it against its record; exit status 1 where one is missing, changed or foreign."""
    place = _existing(store)
    terminal = console()
    with Progress(console=terminal, transient=True, disable=as_json or not terminal.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        found = integrity.verify(
            place.store,
            _folders(place),
            lambda done, total: bar.update(task, completed=done, total=total),
            _awaited(place),
        )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        for problem in found.problems:
            terminal.print(_described(problem), soft_wrap=True)
        well = f"{len(found.problems)} problems in" if found.problems else "all is as recorded:"
        terminal.print(f"{well} {found.outputs} outputs, {found.files:,} files, {size(found.bytes)}")
    if found.problems:
        raise typer.Exit(1)


def _described(problem: Problem) -> str:
    models = [key for key in problem.dependents if "/scores/" not in key]
    scores = [key for key in problem.dependents if "/scores/" in key]
    lines = [f"[red]✗[/red] [bold]{escape(problem.path)}[/bold] {escape(problem.what)}"]
    for name, keys in ((f"made from {problem.key}", models), ("scores that stand on it", scores)):
        if keys:
            more = f" and {len(keys) - MOST_DEPENDENTS} more" if len(keys) > MOST_DEPENDENTS else ""
            lines.append(f"    {name}: {', '.join(keys[:MOST_DEPENDENTS])}{more}")
    return "\n".join(lines)


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed, without a question.")] = False,
    hours: Annotated[float, typer.Option(help="What was written since so many hours stays.")] = 24.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what nothing refers to, and delete it on confirmation; what a running run may need stays."""
    if hours < garbage.LEAST_HOURS:
        raise ValueError(f"--hours {hours:g}: what is younger than an hour may be a running run's; take 1 or more")
    place = _existing(store)
    before = time.time() - 3600 * hours
    found = _garbage(place, before)
    if not as_json:
        console().print(_table(found) if found else "nothing: everything in the store is referred to, or new")
    if found and (yes or (not as_json and typer.confirm(f"Delete these {size(_bytes(found))}?"))):
        now = _garbage(place, before)  # a run may have begun while the question stood
        found = [g for g in now if g in found]
        garbage.remove(place.store, found)
        if not as_json:
            print(f"deleted {size(_bytes(found))}")
    if as_json:
        print(json.dumps({"deleted": yes, "bytes": _bytes(found), "garbage": [asdict(g) for g in found]}, indent=2))


def _bytes(found: Sequence[Garbage]) -> int:
    return sum(g.bytes for g in found)


def _table(found: Sequence[Garbage]) -> Table:
    table = Table("what", "name", "files", "size", header_style="bold")
    for g in found:
        table.add_row(g.what, escape(g.name), f"{len(g.paths):,}", size(g.bytes))
    return table


def _garbage(place: Places, before: float) -> list[Garbage]:
    return garbage.find(place.store, place.home, _needed(place), before, _folders(place), runs.busy(place))


def _needed(place: Places) -> set[str]:
    """What the runs in the store refer to, made or not: their inputs, and items that a suite will ask."""
    from assets.needs import needs

    maker = runs.silent_maker(place)
    needed: set[str] = set()
    for run in runs.known_runs(place):
        try:
            needed.update(needs(maker, run))
        except ValueError as error:
            raise ValueError(
                f"nothing is deleted, as it is not known what run {run!r} needs: {error}: mend that file, or remove "
                "the run's folder"
            ) from error
    return needed


def _awaited(place: Places) -> set[str]:
    """What the runs in the store need or may yet make; a run that can't be read needs nothing that is known."""
    from assets.needs import needs, stages

    maker, found = runs.silent_maker(place), set[str]()
    for run in runs.known_runs(place):
        found.update(stages(run))
        with contextlib.suppress(*UNREADABLE):  # `verify` says of its configuration, or records, what is wrong
            found.update(needs(maker, run))
    return found


def _existing(store: str | None) -> Places:
    place = places(store)
    if not objects.list_files(place.store):
        raise ValueError(f"there is nothing in {place.store}: name the store with --store")
    return place


def _folders(place: Places) -> Collection[str]:
    """The top folders to look at: all, but where the home lies in the store only those of outputs."""
    if objects.is_local(place.store) and place.home.is_relative_to(place.store):
        return FOLDERS
    return {s.path.split("/")[0] for s in objects.list_files(place.store)}
