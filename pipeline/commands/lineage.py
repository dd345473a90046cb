"""Commands that ask what came from what: `gpt2 lineage show | trace | impact | cost | sql | rebuild`."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from pipeline.commands.options import JsonOption, StoreOption
from pipeline.terminal import console, size
from storage import objects
from storage.lineage import Lineage, Node
from storage.places import Places, places

MOST_ROWS = 100  # that are drawn as a table
WIDEST = 2000  # columns of a tree

app = typer.Typer(help="What an output, a file or a score was made from.", no_args_is_help=True)


@app.command()
def show(
    what: Annotated[
        str, typer.Argument(help='A run ("demo"), an output ("demo/scores/eleuther"), or the path of a file.')
    ],
    files: Annotated[int, typer.Option(help="How many files of each output to list.")] = 8,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the tree from an output down to its documents: fingerprints, hub revision, files and their sha256."""
    node = _index(store).ancestry(what)
    if as_json:
        print(json.dumps(asdict(node), indent=2, default=str))
        return
    tree = Tree(_line(node))
    _grow(tree, node, files, set())
    Console(width=WIDEST, highlight=False).print(tree, soft_wrap=True)  # a sha256 is of use only whole


def _grow(tree: Tree, node: Node, files: int, shown: set[str]) -> None:
    """Each output's files once, under the first place where it stands."""
    if node.key not in shown:
        listed = node.files[:files]
        for f in listed:
            tree.add(f"[dim]{escape(f['path'])}  {size(f['bytes'])}  sha256 {f['sha256']}[/dim]")
        if len(node.files) > len(listed):
            tree.add(f"[dim]… and {len(node.files) - len(listed):,} files more: --files {len(node.files)}[/dim]")
    shown.add(node.key)
    for parent in node.inputs:
        _grow(tree.add(_line(parent)), parent, files, shown)


def _line(node: Node) -> str:
    facts = node.facts
    counts = [f"{facts[name]:,} {name}" for name in ("rows", "tokens") if name in facts]
    made = [size(facts["bytes"])] if "bytes" in facts else []
    when = [f"{facts['ended']:%Y-%m-%d %H:%M}"] if "ended" in facts else []
    known = "revision" in facts and "url" in facts
    source = [f"{escape(facts['url'])} at revision {facts['revision']}"] if known else []
    code = (
        [f"commit {facts['commit'][:10]}{' with changes' if facts.get('dirty') else ''}"] if "commit" in facts else []
    )
    since = "replaced since" if node.job else "without a record here: not finished yet, or removed since"
    replaced = [f"[yellow]{since}[/yellow]"] if node.replaced else []
    described = ", ".join([*counts, *made, *source, *when, *code, *replaced])
    return f"[bold]{node.key}[/bold]  {node.job} [dim]{node.fingerprint[:12]}[/dim]  {described}"


@app.command()
def trace(
    run: Annotated[str, typer.Argument(help="A run in the store.")],
    step: Annotated[int | None, typer.Option(help="Name the documents in this step's batch, counted from 0.")] = None,
    document: Annotated[
        str | None, typer.Option(metavar="ID|URL", help="Say at which steps this document was seen.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the documents themselves.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """From a training step to its documents, or from a document to the steps that saw it."""
    if (step is None) == (document is None):
        raise ValueError("trace needs either --step N or --document ID|URL")
    from pipeline import seen  # numpy and pyarrow take as long to load as the other questions to answer

    place = places(store)
    if step is not None:
        found = seen.in_step(place, run, step)
        names = ["id", "url", "dump", "file", "row", "shard", "tokens"]
    else:
        found = seen.steps(place, run, document or "")
        names = ["step", "id", "url", "shard"]
    if text:
        seen.add_texts(place, found)
        if not as_json:
            _print_texts(found)
            return
    _print_rows(found, names, as_json)


def _print_texts(found: list[dict[str, Any]]) -> None:
    for row in {(row["file"], row["row"]): row for row in found}.values():
        print(f"=== {row['id']}  {row['url']}  ({row['file']}, row {row['row']})\n{row['text']}\n")


@app.command()
def impact(
    what: Annotated[
        str, typer.Argument(help="An output; a corpus by its name; a file, such as a shard; a document's id or URL.")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every model and score, and all else, that depends on this: what a fault in it reaches."""
    place = places(store)
    index = _index(store)
    holders = index.outputs(what)
    if holders:
        nodes = index.impact(*holders)
    elif readers := _readers(place, index, what):
        nodes = [*readers, *index.impact(*(node.key for node in readers))]
    else:
        near = index.nearest(what)
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"there is no output, file, corpus or document {what!r} in {place.store} that anything was made from{hint}"
        )
    rows = {n.key: {"output": n.key, "made by": n.job, "fingerprint": n.fingerprint} for n in nodes}
    if len(holders) > 1:  # each has a file of that name: say which of them an output stands on
        below = {holder: {node.key for node in index.impact(holder)} for holder in holders}
        for key, row in rows.items():
            row["made from"] = ", ".join(holder for holder in holders if key in below[holder])
    _print_rows(list(rows.values()), None, as_json)


def _readers(place: Places, index: Lineage, document: str) -> list[Node]:
    from pipeline import seen  # as above

    return seen.readers(place, index, document)


@app.command()
def cost(
    what: Annotated[str, typer.Argument(help="A run or another output.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """What an output and all that it was made from took: seconds, GPU hours, dollars, energy, and what was wasted."""
    rows = [asdict(c) for c in _index(store).cost(what)]
    if not as_json:
        sums = {name: _sum(row[name] for row in rows) for name in ("seconds", "gpu_hours", "dollars", "joules")}
        rows.append(dict.fromkeys(rows[0]) | {"key": "together", **sums})
        rows = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    _print_rows(rows, None, as_json)


def _sum(values: Iterable[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _index(store: str | None) -> Lineage:
    """The index, with the store's present records in it. Raises ValueError where there is neither."""
    place = places(store)
    if objects.is_local(place.store) and not (objects.exists(place.store) or place.home.exists()):
        raise ValueError(f"there is nothing in {place.store}: name the store with --store")
    index = Lineage(place.lineage, place.store)
    index.ingest(place.store)
    return index


def _print_rows(rows: list[dict[str, Any]], columns: list[str] | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" if row[name] is None else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    terminal = console()
    if len(rows) > MOST_ROWS or sum(widths) + 3 * len(widths) + 1 > terminal.width:
        _print_plainly([names, *cells], widths)
        return
    table = Table(*map(escape, names), header_style="bold")
    for line in cells:
        table.add_row(*map(escape, line))
    terminal.print(table if rows else "nothing")


def _print_plainly(lines: list[list[str]], widths: list[int]) -> None:
    """Columns of text: a long table with lines takes a second to draw, and in a wide one they cut off what is said."""
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='Such as "SELECT name, job, size FROM artifacts".')],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a SQL query over the store: tables artifacts, files, edges, runs, metrics, scores, checks, costs,
    environments, documents (docs/lineage.md)."""
    columns, rows = _index(store).sql(query, [places(store).store])
    names = [f"{name}_{n}" if (n := columns[:at].count(name)) else name for at, name in enumerate(columns)]
    _print_rows([dict(zip(names, row, strict=True)) for row in rows], names, as_json)


@app.command()
def rebuild(store: StoreOption = None) -> None:
    """Make the index anew from the records in the store."""
    place = places(store)
    count = Lineage(place.lineage).rebuild(place.store)
    print(f"{count} files of {place.store} are in {place.lineage}")
