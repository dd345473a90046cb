"""Commands that ask what came from what: `gpt2 lineage show | sql | rebuild`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.tree import Tree

from pipeline.commands.run import JsonOption, StoreOption
from pipeline.terminal import console, size
from storage.lineage import Lineage, Node
from storage.places import places

app = typer.Typer(help="What an output, a file or a score was made from.", no_args_is_help=True)


@app.command()
def show(
    what: Annotated[
        str, typer.Argument(help='A run ("demo"), an output ("demo/scores/eleuther"), or the path of a file.')
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the tree from an output down to its documents, with fingerprints and files."""
    place = places(store)
    index = Lineage(place.lineage)
    index.ingest(place.store)
    node = index.ancestry(what)
    if as_json:
        print(json.dumps(asdict(node), indent=2, default=str))
        return
    tree = Tree(_line(node))
    _grow(tree, node)
    console().print(tree)


def _grow(tree: Tree, node: Node) -> None:
    for parent in node.inputs:
        _grow(tree.add(_line(parent)), parent)


def _line(node: Node) -> str:
    facts = node.facts
    counts = [f"{facts[name]:,} {name}" for name in ("rows", "tokens") if name in facts]
    made = [size(facts["bytes"])] if "bytes" in facts else []
    when = [f"{facts['ended']:%Y-%m-%d %H:%M}"] if "ended" in facts else []
    code = (
        [f"commit {facts['commit'][:10]}{' with changes' if facts.get('dirty') else ''}"] if "commit" in facts else []
    )
    replaced = ["[yellow]replaced since[/yellow]"] if node.replaced else []
    described = ", ".join([*counts, *made, *when, *code, *replaced])
    return f"[bold]{node.key}[/bold]  {node.job} [dim]{node.fingerprint[:12]}[/dim]  {described}"


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='Such as "SELECT key, job, bytes FROM artifacts".')],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a SQL query over the index: tables artifacts, files, edges, metrics, scores."""
    place = places(store)
    index = Lineage(place.lineage)
    index.ingest(place.store)
    columns, rows = index.sql(query)
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, default=str))
        return
    table = Table(*columns, header_style="bold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    console().print(table)


@app.command()
def rebuild(store: StoreOption = None) -> None:
    """Make the index anew from the records in the store."""
    place = places(store)
    count = Lineage(place.lineage).rebuild(place.store)
    print(f"{count} records of {place.store} are in {place.lineage}")
