"""Commands that ask what came from what: `gpt2 lineage show | trace | impact | cost | sql | rebuild`."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.tree import Tree

from pipeline import runs
from pipeline.commands.run import JsonOption, StoreOption
from pipeline.terminal import console, size
from storage import objects
from storage.lineage import Lineage, Node
from storage.places import places
from training import trace as tracing

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
    node = _index(store).ancestry(what)
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
def trace(
    run: Annotated[str, typer.Argument(help="A run in the store.")],
    step: Annotated[int | None, typer.Option(help="Name the documents in this step's batch, counted from 0.")] = None,
    document: Annotated[str | None, typer.Option(help="Say at which steps the document of this id was seen.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """From a training step to its documents, or from a document to the steps that saw it."""
    if (step is None) == (document is None):
        raise ValueError("trace needs either --step N or --document ID")
    place = places(store)
    config = runs.existing(place, run)
    tokens = objects.join(place.store, runs.tokens_of(place, run))
    if step is not None:
        seen = tracing.documents_of_step(tokens, config, step)
        _print_rows([asdict(s) for s in seen], ["id", "url", "dump", "file", "row", "shard", "tokens"], as_json)
    else:
        steps = tracing.steps_of_document(tokens, config, document or "")
        _print_rows([{"step": s} for s in steps], ["step"], as_json)


@app.command()
def impact(
    what: Annotated[str, typer.Argument(help="An output or a file, such as a corpus's documents or a shard.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every output that depends on this one: what a fault in it reaches."""
    nodes = _index(store).impact(what)
    _print_rows([{"output": n.key, "made by": n.job, "fingerprint": n.fingerprint} for n in nodes], None, as_json)


@app.command()
def cost(
    what: Annotated[str, typer.Argument(help="A run or another output.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """What an output and all that it was made from took: seconds, GPU hours, dollars."""
    _print_rows([asdict(c) for c in _index(store).cost(what)], None, as_json)


def _index(store: str | None) -> Lineage:
    """The index, with the store's present records in it."""
    place = places(store)
    index = Lineage(place.lineage)
    index.ingest(place.store)
    return index


def _print_rows(rows: list[dict[str, Any]], columns: list[str] | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, header_style="bold")
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in names))
    console().print(table if rows else "nothing")


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='Such as "SELECT key, job, bytes FROM artifacts".')],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a SQL query over the index: tables artifacts, files, edges, metrics, scores."""
    columns, rows = _index(store).sql(query)
    _print_rows([dict(zip(columns, row, strict=True)) for row in rows], columns, as_json)


@app.command()
def rebuild(store: StoreOption = None) -> None:
    """Make the index anew from the records in the store."""
    place = places(store)
    count = Lineage(place.lineage).rebuild(place.store)
    print(f"{count} records of {place.store} are in {place.lineage}")
