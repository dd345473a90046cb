"""What does the report say of the corpus? Eval items and copies in it, and the size and origin of its documents.

`Page` is inspection.json, as the inspection of a run's corpus leaves it.
"""

import html
from collections.abc import Mapping
from typing import Any

from evals import report_plots

Page = Mapping[str, Any]
MOST_DUMPS = 12  # bars
MOST_NAME = 38  # characters of a name beside a bar
CAPTION = "How long the documents are, and where their tokens come from"


def drawing(page: Page) -> report_plots.Drawing | None:
    """Documents by length and, of several crawls, their tokens; None where nobody has looked at the corpus."""
    if not page or not page["lengths"]["documents"]:
        return None
    dumps = [(name, tokens) for name, tokens in page["lengths"]["tokens_by_dump"] if name]
    lengths = page["lengths"]
    histogram = [(size, number) for size, number in lengths["histogram"]]
    shares = [(_short(name), tokens / lengths["tokens"]) for name, tokens in dumps[:MOST_DUMPS]]
    shown = shares if len(shares) > 1 else []  # one bar of 100% says nothing
    return report_plots.corpus(histogram, lengths["quantiles"]["median"], shown)


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"


def tiles(page: Page) -> list[tuple[str, str, str]]:
    """(name, value, note) of what was counted."""
    if not page:
        return []
    items, held, copies = page["contamination"], page["validation"], page["duplicates"]
    near = copies["near"] / max(copies["compared"], 1)
    return [
        ("Eval items in it", f"{len(items['contaminated']):,}", f"of {items['items']:,}, by 13 words in a row"),
        ("Exact copies", f"{copies['exact']:,}", f"of {copies['documents']:,} documents"),
        ("Near copies", f"{near:.2%}", f"of {copies['compared']:,} documents, by MinHash"),
        (
            "Held out, met again",
            f"{len(held['contaminated']):,}",
            f"of {held['items']:,} documents share 13 words with others",
        ),
        ("Median length", f"{page['lengths']['quantiles']['median']:,}", _spread(page["lengths"]["quantiles"])),
    ]


def _spread(quantiles: Mapping[str, int]) -> str:
    return f"tokens; {quantiles['p10']:,} to {quantiles['p90']:,} for eight in ten"


def suites(page: Page) -> list[list[str]]:
    """Rows: suite, its items, those that stand in the corpus, their share."""
    return [
        [
            html.escape(name.replace("_", " ")),
            f"{found['items']:,}",
            f"{found['contaminated']:,}",
            f"{found['contaminated'] / max(found['items'], 1):.2%}",
        ]
        for name, found in page.get("suites", {}).items()
    ]


def overlaps(page: Page) -> list[list[str]]:
    """Rows: an item or a held-out document, the training document, the words that both hold."""
    found = [e for part in ("contamination", "validation") for e in page.get(part, {}).get("examples", [])]
    return [[html.escape(str(e[key])) for key in ("item", "document", "words")] for e in found]
