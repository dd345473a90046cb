"""How do a run's facts and figures become one HTML page that needs no other file and no network?"""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals import comparison, report_data, report_lineage
from evals.reference import Comparison
from evals.report_plots import amount

if TYPE_CHECKING:
    from evals.report import MainLog, Picture, ReportData

SPACE, BLANK = re.compile(r"\n\s*\n"), "\n\n"  # of a sample: a small model may write pages of empty lines
MOST_ROWS = 24  # scores in sight; MMLU alone has 57 subjects
STYLE = Path(__file__).with_name("report.css")


def page(
    runs: "Sequence[ReportData]",
    logs: "Sequence[MainLog]",
    pictures: "Sequence[Picture]",
    comparisons: Sequence[Comparison],
) -> str:
    lead = runs[0]
    by_name = {picture.name: picture for picture in pictures}
    records = report_lineage.ordered(lead.records)
    title = " · ".join(run.name for run in runs)
    body = [
        _header(runs),
        _tiles(lead, logs[0]),
        _section(
            "Training",
            _panes(by_name, ("loss", "hellaswag"))
            + _panes(by_name, ("optimisation",))
            + _panes(by_name, ("stability",)),
        ),
        _section(
            "Scores",
            _panes(by_name, ("scores",))
            + _panes(by_name, ("core",))
            + _scores_table(runs)
            + _comparison_table(lead.name, comparisons),
        ),
        _section("Samples", _samples(lead)),
        _section("Speed and cost", _panes(by_name, ("throughput",)) + _cost_table(records)),
        _section("Data", _data_tiles(lead, records) + _inspection(lead, by_name)),
        _section("Lineage", report_lineage.picture(lead.records) + _records_table(records)),
        _section("What differs", _differences(runs)),
        _section("Configuration", _configuration(runs) + _environment(records)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{STYLE.read_text()}</style></head>\n<body><main>\n{''.join(body)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{content}</section>\n" if content else ""


def _header(runs: "Sequence[ReportData]") -> str:
    run, title = runs[0], " · ".join(run.name for run in runs)
    model = run.config["model"]
    ended = max((str(r.get("ended") or "") for r in run.records), default="")[:16].replace("T", " ")
    facts = [
        f"{model['layers']} layers, {model['channels']} channels, {model['heads']} heads",
        f"context {model['context']}",
        f"corpus {run.config.get('corpus', '')}",
        f"finished {ended} UTC" if ended else "",
        _commit(run.records),
    ]
    line = " · ".join(_text(fact) for fact in facts if fact)
    if len(runs) > 1:  # curves and tables of scores name each run
        line += f"<br>What names no run is of {_text(run.name)}, the first."
    return f"<header><p class='kind'>Training report</p><h1>{_text(title)}</h1><p class='facts'>{line}</p></header>\n"


def _commit(records: Iterable[Mapping[str, Any]]) -> str:
    commits = [r for r in records if r.get("commit")]
    if not commits:
        return ""
    return f"commit {commits[-1]['commit'][:10]}{' with local changes' if commits[-1].get('dirty') else ''}"


def _tiles(run: "ReportData", log: "MainLog") -> str:
    from evals.report import parameters

    tiles = [("Parameters", amount(parameters(run.config["model"])), "")]
    if log.train:
        steps = log.train[-1][0] + 1
        tiles.append(
            (
                "Tokens trained on",
                amount(steps * run.batch_tokens),
                f"{steps:,} steps of {run.batch_tokens:,}",
            )
        )
    if log.validation:
        first, last = log.validation[0][1], log.validation[-1][1]
        tiles.append(("Validation loss", f"{last:.3f}", f"from {first:.3f}"))
    if loss := _score(run, "validation_loss", "bits_per_byte"):
        tiles.append(("Bits per byte", f"{loss['value']:.3f}", plus_minus(loss["stderr"])))
    for suite in ("hellaswag", "completion_demo"):
        if score := _score(run, suite, "completion_acc_norm"):
            name = "HellaSwag" if suite == "hellaswag" else "Completion items"
            tiles.append((name, f"{score['value']:.1%}", f"{plus_minus(score['stderr'], True)}, chance 25%"))
    if core := _score(run, "core", "core"):
        tiles.append(("CORE", f"{core['value']:.4f}", f"{plus_minus(core['stderr'])}, GPT-2 1558M: .2565"))
    speeds = [m["tokens_per_second"] for m in run.metrics if m.get("tokens_per_second")]
    if speeds:
        tiles.append(("Throughput", amount(sorted(speeds)[len(speeds) // 2]), "tokens/s, median"))
    return _tile_row(tiles)


def _tile_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<div class='tile'><p>{_text(name)}</p><b>{_text(value)}</b><span>{_text(note)}</span></div>"
        for name, value, note in tiles
    )
    return f"<div class='tiles'>{cells}</div>\n"


def _data_tiles(run: "ReportData", records: Sequence[Mapping[str, Any]]) -> str:
    """How much text it was, in documents, bytes and tokens, and how often the run read it."""
    facts = {r["asset"]: r for r in records if r["asset"] in ("documents", "token_shards")}
    documents, tokens = facts.get("documents", {}), facts.get("token_shards", {})
    text = (documents.get("metrics") or {}).get("text_bytes")
    count, steps = tokens.get("tokens"), run.config["train"]["steps"]
    tiles = []
    if documents.get("rows"):
        tiles.append(("Documents", f"{documents['rows']:,}", documents["key"].split("/")[1]))
    if text:
        tiles.append(("Text", size(text), "before tokenization"))
    if count:
        shards = (tokens.get("metrics") or {}).get("shards")
        tiles.append(("Tokens", amount(count), f"in {shards} shards, one of them held out" if shards else ""))
        tiles.append(("Passes", f"{steps * run.batch_tokens / count:.2g}", "tokens trained on / tokens there"))
    if text and count:
        tiles.append(("Bytes per token", f"{text / count:.2f}", "how far the text is compressed"))
    return _tile_row(tiles) if tiles else ""


def _inspection(run: "ReportData", pictures: "Mapping[str, Picture]") -> str:
    """What stands in the corpus: eval items, copies, lengths, and where it comes from."""
    counted = report_data.tiles(run.inspection)
    overlaps = _table(["item", "training document", "words in common"], report_data.overlaps(run.inspection))
    return (
        (_tile_row(counted) if counted else "")
        + _panes(pictures, ("data",))
        + _table(["eval items", "items", "in the corpus", "share"], report_data.suites(run.inspection))
        + (f"<details><summary>Examples of words in common</summary>{overlaps}</details>" if overlaps else "")
    )


def _differences(runs: "Sequence[ReportData]") -> str:
    """What may explain a difference between the leading run and each other one."""
    rows = [
        [_text(other.name), d.area, _text(d.key), _text(d.left), _text(d.right)]
        for other in runs[1:]
        for d in comparison.differences(runs[0], other)
    ]
    return _table(["run", "area", "key", runs[0].name, "that run"], rows)


def _score(run: "ReportData", suite: str, name: str) -> Mapping[str, Any] | None:
    return run.scores.get(suite, {}).get("scores", {}).get(name)


def _panes(pictures: "Mapping[str, Picture]", names: Sequence[str]) -> str:
    shown = [_picture(pictures[name]) for name in names if name in pictures]
    return f"<div class='panes n{len(shown)}'>{''.join(shown)}</div>\n" if shown else ""


def _picture(picture: "Picture") -> str:
    sources = {theme: "data:image/png;base64," + base64.b64encode(png).decode() for theme, png in picture.png.items()}
    return (
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{sources['dark']}'>"
        f"<img src='{sources['light']}' alt='{_text(picture.caption)}'></picture></figure>"
    )


def _scores_table(runs: "Sequence[ReportData]") -> str:
    rows = []
    for run in runs:
        for suite, entry in run.scores.items():
            for name, score in entry["scores"].items():
                who = [_text(run.name)] if len(runs) > 1 else []
                rows.append(
                    [*who, _text(suite), _text(name.replace("_", " ")),
                     value_and_error(name, score["value"], score["stderr"]),
                     f"{score['n']:,}", _text(entry["protocol"]), f"{entry['truncated']:,}"]
                )  # fmt: skip
    head = ["run"] if len(runs) > 1 else []
    head += ["suite", "score", "value ± standard error", "n", "protocol", "truncated"]
    more = f"<details><summary>{len(rows) - MOST_ROWS} more scores</summary>{_table(head, rows[MOST_ROWS:])}</details>"
    return _table(head, rows[:MOST_ROWS]) + (more if len(rows) > MOST_ROWS else "")


def _comparison_table(name: str, comparisons: Sequence[Comparison]) -> str:
    rows = [
        [_text(f"{c.suite}: {c.score}".replace("_", " ")), value_and_error(c.score, c.value, c.stderr),
         _text(c.against), value_and_error(c.score, c.reference, c.reference_stderr),
         "–" if c.errors is None else f"{c.errors:+.1f}",
         f"<span class='{c.verdict.split()[0]}'>{c.verdict}</span>",
         _text(c.source) + (", on the same items" if c.same_items else "")]
        for c in comparisons
    ]  # fmt: skip
    head = ["score", name, "against", "its value", "standard errors apart", "verdict", "source"]
    return ("<h3>Compared</h3>" + _table(head, rows)) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table></div>\n"


def _samples(run: "ReportData") -> str:
    """The finished model's texts from one prompt, then what it wrote while training, the last first."""
    prompted, earlier = _blocks(run.unicorns), _blocks(run.samples)[::-1]
    return _quotes(prompted, 4, "more samples") + _quotes(earlier, 1 if prompted else 4, "samples while training")


def _blocks(text: str) -> list[tuple[str, str]]:
    """Heads and texts of blocks that begin with `=== head ===`."""
    blocks = re.split(r"(?m)^=== (.+?) ===$", text)
    parts = [("", blocks[0])] if blocks[0].strip() else []
    return [(head, body) for head, body in [*parts, *zip(blocks[1::2], blocks[2::2], strict=True)] if body.strip()]


def _quotes(blocks: Sequence[tuple[str, str]], most: int, rest: str) -> str:
    quotes = [
        f"<figure class='sample'><figcaption>{_text(head)}</figcaption>"
        f"<pre>{_text(SPACE.sub(BLANK, body.strip()))}</pre></figure>"
        for head, body in blocks
    ]
    more = f"<details><summary>{len(quotes) - most} {rest}</summary>{''.join(quotes[most:])}</details>"
    return "".join(quotes[:most]) + (more if len(quotes) > most else "")


COSTS = {"gpu_hours": "{:.3g}", "dollars": "${:,.2f}", "joules": "{:,.0f} J"}
WASTE = {"goodput": "{:.1%}", "restarts": "{:,}", "rewinds": "{:,}", "skipped_updates": "{:,}"}


def _cost_table(records: Sequence[Mapping[str, Any]]) -> str:
    costs = [(record["key"], record["cost"]) for record in records if "seconds" in (record.get("cost") or {})]
    rows = [
        [_text(key), duration(cost["seconds"]), *(_optional(cost, name, COSTS[name]) for name in COSTS)]
        for key, cost in costs
    ]
    if rows:
        sums = {name: sum(cost.get(name) or 0.0 for _, cost in costs) for name in ("seconds", *COSTS)}
        shown = [_optional(sums, name, COSTS[name]) for name in COSTS]
        rows.append(["<b>together</b>", f"<b>{duration(sums['seconds'])}</b>", *shown])
    table = _table(["output", "time", "GPU hours", "cost", "energy"], rows)
    wasted = [
        [_text(key), *(_known(cost, name, WASTE[name]) for name in WASTE)] for key, cost in costs if "goodput" in cost
    ]
    heads = ["training", "useful steps of all paid", "restarts", "rewinds", "skipped updates"]
    return table + (_table(heads, wasted) if wasted else "")


def _known(values: Mapping[str, Any], key: str, pattern: str) -> str:
    """A number that may be 0; a dash where it is not known."""
    return "–" if values.get(key) is None else pattern.format(values[key])


def _optional(values: Mapping[str, Any], key: str, pattern: str) -> str:
    return pattern.format(values[key]) if values.get(key) else "–"


def _records_table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [_text(r["key"]), _optional(r, "rows", "{:,}"), _optional(r, "tokens", "{:,}"),
         size(sum(f["bytes"] for f in r.get("files", []))),
         f"<code>{_text(str(r['fingerprint'])[:12])}</code>"]
        for r in records
    ]  # fmt: skip
    return _table(["output", "rows", "tokens", "size", "fingerprint"], rows)


def _configuration(runs: "Sequence[ReportData]") -> str:
    """Every key of the run; with several runs, a column each and the differing rows marked."""
    flat = [dict(comparison.flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = []
    for key in keys:
        values = [_text(one.get(key, "–")) for one in flat]
        cells = [f"<span class='differs'>{v}</span>" for v in values] if len(set(values)) > 1 else values
        rows.append([_text(key), *cells])
    table = _table(["key", *(run.name for run in runs)], rows)
    return f"<details><summary>{len(keys)} values</summary>{table}</details>"


def _environment(records: Sequence[Mapping[str, Any]]) -> str:
    for record in reversed(records):
        if record.get("versions"):
            facts = {**record.get("hardware", {}), **record["versions"]}
            table = _table(["", ""], [[_text(k), _text(v)] for k, v in facts.items()])
            return f"<details><summary>Hardware and library versions</summary>{table}</details>"
    return ""


def size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def plus_minus(stderr: float | None, percent: bool = False) -> str:
    if stderr is None:
        return ""
    return f"± {stderr:.1%}" if percent else f"± {stderr:.3f}"


def value_and_error(name: str, value: float, stderr: float | None) -> str:
    digits = 2 if value >= 100 else 4
    text = f"{value:,.{digits}f}" + (f" ± {stderr:,.{digits}f}" if stderr is not None else "")
    return text.replace(" ", "\u00a0")
