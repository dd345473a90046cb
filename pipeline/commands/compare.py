"""Commands that set runs side by side: `gpt2 compare`, `gpt2 report`."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from evals import reference
from evals.comparison import differences
from pipeline import runs
from pipeline.commands.options import JsonOption, StoreOption
from pipeline.terminal import console
from storage import objects
from storage.places import Places, places
from training.config import SUITES

if TYPE_CHECKING:
    from evals.report import Baseline, ReportData

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN…", help="Runs in the store.")]


def add_to(app: typer.Typer) -> None:
    app.command("compare")(compare)
    app.command("report")(report)


def compare(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run in the store.")],
    against: Annotated[
        list[str],
        typer.Argument(metavar="RUN|MODEL…", help="Runs, models scored with --like RUN, or published ones: gpt2-xl …"),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say for each score whether a run is better, worse or equal, and what differs between two runs."""
    place = places(store)
    ours = _read(place, run)
    models = _models(place, run)
    scores: list[reference.Comparison] = []
    different: dict[str, list[dict[str, Any]]] = {}
    outdated: dict[str, list[str]] = {}
    for other in against:
        if runs.stored(place, other) is not None:
            theirs = _read(place, other)
            unlike = _scored_otherwise(ours, theirs)
            alike = {suite: page for suite, page in theirs.scores.items() if suite not in unlike}
            scores += reference.against_run(ours.scores, alike, other, ours.items, theirs.items)
            for name, suites in ((run, _outdated(ours, unlike)), (other, _outdated(theirs, unlike))):
                outdated[name] = sorted({*outdated.get(name, []), *suites})
            different[other] = [asdict(d) for d in differences(ours, theirs)]
            continue
        if other not in reference.SIZES and other not in models:
            _refuse(place, other, models)
        scores += reference.against_published(ours.scores, other)
        for model in models.get(other, []):
            scores += reference.against_run(ours.scores, model.scores, model.name, ours.items, model.items)
    if as_json:
        answer = {"scores": [asdict(c) for c in scores], "differences": different, "outdated": outdated}
        print(json.dumps(answer, indent=2))
        return
    terminal = console()
    terminal.print(score_table(run, scores) if scores else "there is no score that both have")
    for name, old in outdated.items():
        if old:
            command = " ".join(["gpt2 evals", name, *(f"--suite {suite}" for suite in old)])
            terminal.print(f"older code has scored {', '.join(old)} of {name}, not compared: `{command}` scores anew")
    for other, found in different.items():
        terminal.print(_difference_table(run, other, found))


def _versions(run: "ReportData") -> dict[str, str]:
    """Which version of the code has scored each suite."""
    return {record["asset"]: record["code_version"] for record in run.records if record["asset"] in SUITES}


def _scored_otherwise(ours: "ReportData", theirs: "ReportData") -> set[str]:
    """Suites that two versions of the code have scored: what came of them does not compare."""
    one, other = _versions(ours), _versions(theirs)
    return {suite for suite in one.keys() & other.keys() if one[suite] != other[suite]}


def _outdated(run: "ReportData", suites: Iterable[str]) -> list[str]:
    """Those of the suites that another version of the code has scored than is here."""
    from assets.scores import VERSION

    return [suite for suite in suites if _versions(run)[suite] != VERSION]


def score_table(run: str, comparisons: list[reference.Comparison]) -> Table:
    table = Table("suite", "score", run, "against", "theirs", "difference", "in ± of it", "verdict", "source")
    for c in comparisons:
        error = "" if c.stderr is None else f" ± {c.stderr:.4f}"
        other = "" if c.reference_stderr is None else f" ± {c.reference_stderr:.4f}"
        errors = "" if c.errors is None else f"{c.errors:+.1f}"
        difference = "" if c.verdict.startswith("other") else f"{c.difference:+.4f}"
        row = (f"{c.value:.4f}{error}", c.against, f"{c.reference:.4f}{other}", difference, errors)
        table.add_row(c.suite, c.score, *row, c.verdict, c.source + (", same items" if c.same_items else ""))
    return _whole(table)


def _difference_table(run: str, other: str, found: list[dict[str, Any]]) -> Table:
    table = Table("area", "what", run, other, title=f"what differs between {run} and {other}")
    for difference in found:
        table.add_row(difference["area"], difference["key"], difference["left"], difference["right"])
    return _whole(table)


def _whole(table: Table) -> Table:
    """Two names may differ in their last letters only: what is too long goes on in the next line."""
    for column in table.columns:
        column.overflow = "fold"
    return table


def report(
    names: RunsArgument,
    out: Annotated[str, typer.Option(help="The folder for index.html and its figures.")] = "report",
    store: StoreOption = None,
) -> None:
    """Write one page that overlays several runs; the first leads."""
    from evals.report import build  # matplotlib takes a second to load

    place = places(store)
    if not objects.is_local(out):
        raise ValueError(f"--out {out}: the page is written to a local folder")
    if os.path.isfile(out):
        raise ValueError(f"--out {out} is a file: name the folder for the page")
    made = build([_read(place, name) for name in names], out)
    print(made.files[0])


def _refuse(place: Places, other: str, models: Iterable[str]) -> None:
    here = ", ".join([*runs.known_runs(place), *models])
    raise ValueError(f"{other} is no run, and nothing is known of such a model: choose from {here}, or a published "
                     f"one: {', '.join(reference.SIZES)}; `gpt2 evals {other} --like RUN` scores a model")  # fmt: skip


def _read(place: Places, run: str) -> "ReportData":
    from assets.baselines import beside
    from assets.card import outputs_of
    from assets.report import report_data

    runs.existing(place, run)
    maker = runs.silent_maker(place)
    outputs = outputs_of(maker, run)
    return report_data(maker, run, outputs, beside(maker, run, outputs))


def _models(place: Places, run: str) -> "dict[str, list[Baseline]]":
    """Models that were asked what the run was, by name."""
    from assets.baselines import asked_the_same, baseline
    from assets.card import outputs_of

    found: dict[str, list[Baseline]] = {}
    maker = runs.silent_maker(place)
    for other in asked_the_same(maker, run, outputs_of(maker, run)):
        found.setdefault(other.name, []).append(baseline(place.store, other))
    return found
