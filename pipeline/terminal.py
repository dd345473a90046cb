"""What does a person see while a run goes on? A line a stage, a bar in the long ones, a table at the end."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from storage import objects
from storage.records import Record

if TYPE_CHECKING:  # Dagster takes a second to load, which commands that only ask need not wait for
    from assets.making import Made
    from assets.resources import Event

PLAIN_WIDTH = 140  # columns, where the output is no terminal
LINE_SECONDS = 300.0  # between two lines on the progress of a stage there, at most


def console() -> Console:
    """Stdout for tables: as wide as the terminal, and wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


@contextmanager
def quiet_output() -> Iterator[Console]:
    """A console on the terminal, while stdout and stderr of this process and its children go nowhere.

    Dagster keeps what they print in each run's compute logs; on the terminal it would cut through the bars.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with os.fdopen(os.dup(kept[0]), "w", encoding=sys.stdout.encoding, errors="replace") as terminal:
            drawn = os.isatty(kept[0])
            yield Console(file=terminal, force_terminal=drawn, width=None if drawn else PLAIN_WIDTH, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


@dataclass
class Terminal:
    """A listener that draws. Where there is no terminal, a line at each quarter and every few minutes is its bar."""

    console: Console
    made: "dict[str, Made]" = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # asset → why
    bar: Progress | None = None
    tasks: dict[str, TaskID] = field(default_factory=dict)  # bars of the stages that go on: two while training waits
    quarters: dict[str, int] = field(default_factory=dict)  # of each stage, last printed where there are no bars
    printed: dict[str, float] = field(default_factory=dict)  # when each stage's last line was
    line_seconds: float = LINE_SECONDS

    def started(self, asset: str) -> None:
        if not self.console.is_terminal or asset in self.tasks:
            return
        if self.bar is None:
            self.bar = Progress(
                TextColumn("  [bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                redirect_stdout=False,  # what the processes print belongs to the compute logs alone
                redirect_stderr=False,
            )
            self.bar.start()
        self.tasks[asset] = self.bar.add_task(asset, total=None, text="")

    def progressed(self, asset: str, event: "Event") -> None:
        if event["event"] == "warning":
            self.console.print(f"  [yellow]![/yellow] [bold]{asset:<16}[/bold] {escape(event['message'])}")
        if event["event"] == "failed":
            self.failed[asset] = event["message"]
            self.console.print(f"  [red]✗[/red] [bold]{asset:<16}[/bold] {escape(event['message'])}")
        shown = _progress(event)
        if shown is None:
            return
        done, total, text = shown
        if self.bar and asset in self.tasks:
            self.bar.update(self.tasks[asset], completed=done, total=total, text=text)
        elif total and self._due(asset, 4 * done // total):
            self.quarters[asset], self.printed[asset] = 4 * done // total, time.monotonic()
            self.console.print(f"    {asset}: {100 * done // total}%  {text}")

    def _due(self, asset: str, quarter: int) -> bool:
        """Whether a line on its progress is to be printed, where there is no bar."""
        if quarter > self.quarters.get(asset, -1):
            return True
        return time.monotonic() - self.printed[asset] >= self.line_seconds

    def finished(self, asset: str, made: "Made") -> None:
        self.quarters.pop(asset, None)
        if self.bar and asset in self.tasks:
            self.bar.remove_task(self.tasks.pop(asset))
        if not self.tasks:
            self.close()
        self.made[made.record.key] = made
        verb = f"reused: {made.reason}" if made.reused else f"made in {made.seconds:.1f} s ({made.reason})"
        what = escape(summary(made.record))
        self.console.print(f"  [green]✓[/green] [bold]{asset:<16}[/bold] {what} — [dim]{escape(verb)}[/dim]")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
            self.tasks.clear()


def _progress(event: "Event") -> tuple[int, int, str] | None:
    """(done, total, what to say) of an event; None for one that moves no bar."""
    match event["event"]:
        case "training_step":
            speed = f"{event['tokens_per_second']:,.0f} tok/s"
            return (
                event["step"],
                event["steps"],
                f"step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  {speed}",
            )
        case "parts":
            return event["done"], event["total"], f"{event['done']}/{event['total']} parts"
        case "eval_progress":
            return event["done"], event["total"], f"{event['done']}/{event['total']} items"
        case "bytes":
            tokens = f"  {event['tokens']:,} tokens" if "tokens" in event else ""
            if rate := event.get("tokens_per_second"):
                tokens += f"  {rate:,.0f} tok/s"
            return event["done"], event["total"], f"{event['done'] / 2**20:,.1f} MiB{tokens}"
    return None


def summary(record: Record) -> str:
    """What an output is, in a few words."""
    metrics = record.metrics
    match record.asset:
        case "documents" if not metrics["text_bytes"]:
            return f"{record.rows:,} shards that others have made"
        case "documents":
            return f"{record.rows:,} documents, {metrics['text_bytes'] / 1e6:,.1f} MB of text"
        case "token_shards":
            return f"{record.tokens:,} tokens in {metrics['shards']} shards"
        case "eval_items":
            return f"{record.rows:,} items"
        case "starting_weights":
            return f"{metrics['source']}{' at ' + metrics['revision'][:12] if metrics['revision'] else ''}"
        case "trained_model":
            before, after = metrics["validation_loss_before"], metrics["validation_loss_after"]
            return f"{metrics['parameters']:,} parameters, validation loss {before:.3f} → {after:.3f}"
        case "hf_model":
            difference = metrics.get("checkpoint_difference", metrics["max_difference"])  # which older records lack
            return f"{metrics['parameters']:,} parameters, logits within {difference:.1e}"
        case "samples":
            return f"{record.rows} texts of {metrics['tokens_each']} tokens"
        case "model":
            return f"{metrics['name']} from {metrics['source']}"
        case "inspection":
            found = f"{metrics['contaminated_items']:,} of {metrics['items']:,} eval items in the corpus"
            return f"{found}, {metrics['near_duplicates_share']:.1%} of its documents nearly twice"
        case "report":
            return "a page that stands alone"
    shown = [
        f"{name} {score['value']:.4f}" + (f" ± {score['stderr']:.4f}" if score["stderr"] is not None else "")
        for name, score in metrics["scores"].items()
    ]
    return ", ".join(shown[:2])


def results_table(made: "list[Made]") -> Table:
    """Stage, what was made, seconds, size, path: a row an output."""
    table = Table(title=None, header_style="bold", expand=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("what was made")
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("path", overflow="fold")
    for one in made:
        seconds = "reused" if one.reused else f"{one.seconds:.1f}"
        what, place = escape(summary(one.record)), escape(near(one.location))
        table.add_row(one.record.asset, what, seconds, size(one.record.bytes), place)
    return table


def near(location: str) -> str:
    """A path from here where that is shorter."""
    return min(location, os.path.relpath(location), key=len) if objects.is_local(location) else location


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
