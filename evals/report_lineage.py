"""From what was this run made? Its ancestry as a picture: boxes from left to right, in themed SVG."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, LANE = 196, 66, 50, 18, 6, 12


def picture(records: Sequence[Mapping[str, Any]]) -> str:
    """Empty without records."""
    if not records:
        return ""
    by_key = {r["key"]: r for r in records}
    columns = _columns(by_key)
    places = _places(columns)
    tall = max(len(c) for c in columns) * (HEIGHT + GAP_Y) - GAP_Y + MARGIN
    edges = [(p["key"], key) for key, r in by_key.items() for p in r.get("parents", []) if p["key"] in by_key]
    far = [edge for edge in edges if places[edge[1]][0] - places[edge[0]][0] > WIDTH + GAP_X]
    lanes = {parent: tall + LANE * (n + 1) for n, parent in enumerate(dict.fromkeys(p for p, _ in far))}
    arrows = [_arrow(places[p], places[c], lanes[p] if (p, c) in far else None) for p, c in edges]
    boxes = [_box(by_key[key], *place) for key, place in places.items()]
    width = len(columns) * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = tall + LANE * len(lanes) + MARGIN
    return (
        f"<div class='scroll'><svg class='lineage' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}' role='img' aria-label='lineage'>"
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0 0.5 L7.5 4 L0 7.5 z'/></marker></defs>"
        f"{''.join(arrows)}{''.join(boxes)}</svg></div>\n"
    )


def ordered(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Parents before what was made from them."""
    by_key = {r["key"]: r for r in records}
    return [by_key[key] for column in _columns(by_key) for key in column] if records else []


def _columns(by_key: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Each output one column to the right of its furthest parent."""
    depth: dict[str, int] = {}

    def of(key: str) -> int:
        if key not in depth:
            parents = [p["key"] for p in by_key[key].get("parents", []) if p["key"] in by_key]
            depth[key] = 1 + max((of(p) for p in parents), default=-1)
        return depth[key]

    columns: list[list[str]] = [[] for _ in range(max(of(key) for key in by_key) + 1)]
    for key in by_key:
        columns[of(key)].append(key)
    return columns


def _places(columns: Sequence[Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Top left corners; a short column stands in the middle of the tallest."""
    tallest = max(len(c) for c in columns)
    return {
        key: (
            MARGIN + x * (WIDTH + GAP_X),
            MARGIN + (y + (tallest - len(column)) / 2) * (HEIGHT + GAP_Y),
        )
        for x, column in enumerate(columns)
        for y, key in enumerate(column)
    }


def _arrow(start: tuple[float, float], end: tuple[float, float], lane: float | None) -> str:
    """A curve to the next column; one that skips columns runs along a lane below all boxes."""
    x1, y1 = start[0] + WIDTH, start[1] + HEIGHT / 2
    x2, y2 = end[0] - 3, end[1] + HEIGHT / 2
    bend = GAP_X * 0.6
    if lane is None:
        path = f"M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    else:
        down, up = x1 + GAP_X - 8, x2 - GAP_X + 8
        path = (
            f"M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x1 + 8:.1f} {lane:.1f} {down:.1f} {lane:.1f} "
            f"L{up:.1f} {lane:.1f} C{x2 - 8:.1f} {lane:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        )
    return f"<path class='arrow' d='{path}' marker-end='url(#tip)'/>"


def _box(record: Mapping[str, Any], x: float, y: float) -> str:
    lines = [
        ("name", record["asset"].replace("_", " ")),
        ("where", _short(record["key"])),
        ("what", _what(record)),
    ]
    text = "".join(
        f"<text class='{kind}' x='{x + 12:.1f}' y='{y + 21 + 18 * n:.1f}'>{html.escape(line)}</text>"
        for n, (kind, line) in enumerate(lines)
    )
    tip = f"{record['key']}\nfingerprint {record['fingerprint']}"
    return (
        f"<g><title>{html.escape(tip)}</title>"
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{WIDTH}' height='{HEIGHT}' rx='8'/>{text}</g>"
    )


def _short(key: str, most: int = 25) -> str:
    return key if len(key) <= most else "…" + key[1 - most :]


def _what(record: Mapping[str, Any]) -> str:
    if record.get("tokens"):
        return f"{record['tokens']:,} tokens"
    if record.get("rows"):
        return f"{record['rows']:,} rows"
    return str(record["fingerprint"])[:12]
