"""How does a run look? Its curves and scores as figures, in a light and in a dark dress."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

Points = tuple[Sequence[float], Sequence[float]]  # x, y
DPI = 200
THUMBNAIL_DPI = 60
JOINED_DOTS = 12  # validation points are joined from here on: fewer lines between far points would look measured
DASHES = ((5, 3), (1, 2), (5, 2, 1, 2), (9, 3))  # of levels


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]  # told apart by colour-blind readers as well, in this order


LIGHT = Theme(
    "#ffffff",
    "#1c1e21",
    "#62666d",
    "#e7e8ea",
    ("#2a6bcc", "#d0601a", "#17805a", "#8a4fbf", "#b3124e", "#5b6b7a"),
)
DARK = Theme(
    "#17191d",
    "#e9e9e7",
    "#9b9fa6",
    "#2b2e34",
    ("#74a9ff", "#f49a5c", "#58c999", "#c19bf5", "#ff7fa6", "#a5b4c3"),
)
THEMES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Curve:
    """One run's line in a figure."""

    name: str
    points: Points
    dots: Points = ((), ())  # marked points that go with the line: validation losses
    smooth: bool = False  # draw the raw line faint and its running mean strong


@dataclass(frozen=True)
class Line:
    """A level to compare with: a model that was not trained here."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """A score with its error, and what it is compared with."""

    name: str
    value: float
    stderr: float | None
    marks: tuple[Line, ...] = ()


Drawing = Callable[[Theme], Figure]


def render(drawing: Drawing) -> dict[str, bytes]:
    """The figure as PNG in each theme."""
    pictures = {}
    for name, theme in THEMES.items():
        buffer = io.BytesIO()
        drawing(theme).savefig(buffer, format="png", dpi=DPI, facecolor=theme.paper)
        pictures[name] = buffer.getvalue()
    return pictures


def thumbnail(drawing: Drawing) -> bytes:
    """The figure as one small PNG, light: some 15 KB."""
    buffer = io.BytesIO()
    drawing(LIGHT).savefig(buffer, format="png", dpi=THUMBNAIL_DPI, facecolor=LIGHT.paper)
    return buffer.getvalue()


def loss(curves: Sequence[Curve], lines: Sequence[Line], wide: bool) -> Drawing:
    """Training loss with validation points, against tokens; the lines are models evaluated on that shard."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(theme, 10.4 if wide else 5.6, 4.0)
        several = len(curves) > 1
        for number, curve in enumerate(curves):
            colour = theme.series[number % len(theme.series)]
            name = curve.name if several else "training"
            _plot_curve(axes, curve, colour, name)
            dot = colour if several else theme.series[1]
            if curve.dots[0]:
                label = None if several else "validation"
                if len(curve.dots[0]) >= JOINED_DOTS:
                    axes.plot(*curve.dots, "-", color=dot, lw=0.9, alpha=0.55)
                axes.plot(*curve.dots, "o", color=dot, ms=5, mec=theme.paper, mew=0.9, label=label, zorder=5)
        _fit_loss(axes, curves, lines)
        _levels(axes, lines, theme, len(curves))
        _tokens_axis(axes)
        axes.set_ylabel("cross-entropy loss (nats per token)")
        _title(axes, "Loss", theme)
        if several:
            axes.plot([], [], "o", color=theme.muted, ms=5, label="dots: validation")
        _legend(axes, theme, "upper right")
        return figure

    return draw


def accuracy(curves: Sequence[Curve], lines: Sequence[Line]) -> Drawing:
    """HellaSwag accuracy during training against tokens, with the lines of models of the same size."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(theme, 5.6, 4.0)
        for number, curve in enumerate(curves):
            colour = theme.series[number % len(theme.series)]
            axes.plot(*curve.points, "-o", color=colour, lw=1.7, ms=4, mec=theme.paper, mew=0.7, label=curve.name)
        values = [v for c in curves for v in c.points[1]] + [line.value for line in lines] + [0.25]
        low, high = min(values), max(values) + 0.012
        legend = 0.06 * (len(curves) + len(lines) + 1) + 0.04  # its share of the height, left free of lines
        axes.set_ylim(low - legend / (1 - legend) * (high - low), high)
        _levels(axes, lines, theme, len(curves))
        _level(axes, Line("chance", 0.25), theme.muted, DASHES[0])
        _tokens_axis(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accuracy")
        _title(axes, "HellaSwag", theme)
        _legend(axes, theme, "lower right")
        return figure

    return draw


def optimisation(rates: Sequence[Curve], norms: Sequence[Curve], skipped: Points) -> Drawing:
    """Learning rate, and gradient norm before clipping, with the updates that were skipped."""

    def draw(theme: Theme) -> Figure:
        figure, (left, right) = _pair(theme)
        for number, (rate, norm) in enumerate(zip(rates, norms, strict=True)):
            colour = theme.series[number % len(theme.series)]
            left.plot(*rate.points, color=colour, lw=1.8, label=rate.name)
            _plot_curve(right, norm, colour, norm.name)
        _title(left, "Learning rate", theme)
        left.yaxis.set_major_formatter(FuncFormatter(_scientific))
        left.set_ylim(bottom=0)
        _title(right, "Gradient norm, before clipping", theme)
        _log_if_wide(right, [v for c in norms for v in c.points[1]])
        if skipped[0]:
            right.plot(*skipped, "x", color=theme.series[4], ms=6, label="skipped update", zorder=6)
        for axes in (left, right):
            _tokens_axis(axes)
        if len(rates) > 1:
            _legend(left, theme, "upper right")
        if skipped[0]:
            _legend(right, theme, "upper right")
        return figure

    return draw


def throughput(speeds: Sequence[Curve], uses: Sequence[Curve]) -> Drawing:
    """Tokens a second and, where the hardware's peak is known, the share of it that was used."""

    def draw(theme: Theme) -> Figure:
        shown = [("Throughput", "tokens per second", speeds)]
        if any(c.points[0] for c in uses):
            shown.append(("Model FLOPs utilisation", "share of the GPU's peak", uses))
        if len(shown) == 1:
            figure, only = _figure(theme, 10.4, 3.2)
            panes = [only]
        else:
            figure, panes = _pair(theme)
        for axes, (title, unit, curves) in zip(panes, shown, strict=True):
            for number, curve in enumerate(curves):
                _plot_curve(axes, curve, theme.series[number % len(theme.series)], curve.name)
            _title(axes, title, theme)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0) if "share" in unit else FuncFormatter(amount))
            _tokens_axis(axes)
        if len(speeds) > 1:
            _legend(panes[0], theme, "lower right")
        return figure

    return draw


def stability(logits: Sequence[Curve], sizes: Sequence[Curve]) -> Drawing:
    """The largest attention logit and activation RMS of any layer: what grows long before a loss diverges."""

    def draw(theme: Theme) -> Figure:
        figure, panes = _pair(theme)
        for axes, title, curves in zip(
            panes, ("Largest attention logit", "Activation RMS"), (logits, sizes), strict=True
        ):
            for number, curve in enumerate(curves):
                axes.plot(*curve.points, "-o", color=theme.series[number % 6], lw=1.5, ms=3.5, label=curve.name)
            _title(axes, title, theme)
            axes.set_ylabel("largest of all layers")
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
            _tokens_axis(axes)
        if len(logits) > 1:
            _legend(panes[0], theme, "lower right")
        return figure

    return draw


def scores(run: str, bars: Sequence[Bar], title: str, levels: Sequence[Line]) -> Drawing:
    """A run's scores, with error bars of one standard error; references as marks beside them, levels as lines."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(theme, 10.4, 1.5 + (0.42 if len(bars) < 13 else 0.3) * len(bars))
        places = list(range(len(bars)))[::-1]
        names = list(dict.fromkeys(mark.name for bar in bars for mark in bar.marks))
        colours = {name: theme.series[1 + n % 5] for n, name in enumerate(names)}
        for place, bar in zip(places, bars, strict=True):
            style = {"fmt": "o", "ms": 7, "capsize": 4, "lw": 1.8, "color": theme.series[0], "zorder": 5}
            axes.errorbar(bar.value, place, xerr=bar.stderr, **style)  # type: ignore[arg-type]
            for mark in bar.marks:
                axes.plot(mark.value, place + 0.24, "d", ms=7, color=colours[mark.name], mec=theme.paper, zorder=6)
        axes.plot([], [], "o", color=theme.series[0], label=f"{run}, ± 1 standard error")
        for name, colour in colours.items():
            axes.plot([], [], "d", color=colour, label=name)
        for level, colour in zip(levels, [theme.muted, theme.series[2], theme.series[1]], strict=False):
            axes.axvline(level.value, color=colour, lw=1.2, ls=(0, (4, 3)), label=level.name)
        axes.set_yticks(places, [b.name for b in bars])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.set_xlim(*_span(bars, levels))
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _title(axes, title, theme)
        figure.legend(loc="outside lower center", ncol=4, frameon=False, labelcolor=theme.muted, fontsize=8.5)
        return figure

    return draw


def corpus(histogram: Sequence[tuple[int, int]], median: int, dumps: Sequence[tuple[str, float]]) -> Drawing:
    """Documents by length, (tokens, documents of that many up to twice as many), and shares of tokens by crawl."""

    def draw(theme: Theme) -> Figure:
        if dumps:
            figure, panes = _pair(theme)
        else:
            figure, only = _figure(theme, 10.4, 3.2)
            panes = [only]
        sizes, counts = [size for size, _ in histogram], [count for _, count in histogram]
        panes[0].bar(sizes, counts, sizes, align="edge", color=theme.series[0], ec=theme.paper)
        panes[0].set_xscale("log", base=2)
        panes[0].axvline(median, color=theme.series[1], lw=1.4, ls=(0, (5, 3)), label=f"median {median:,}")
        panes[0].set(xlabel="tokens", ylabel="documents")
        panes[0].xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        panes[0].yaxis.set_major_formatter(FuncFormatter(amount))
        _title(panes[0], "Documents by length", theme)
        _legend(panes[0], theme, "upper left")
        if dumps:
            places = list(range(len(dumps)))[::-1]
            panes[1].barh(places, [share for _, share in dumps], height=0.7, color=theme.series[0])
            panes[1].set_yticks(places, [name for name, _ in dumps], fontsize=7.5)
            panes[1].xaxis.set_major_formatter(PercentFormatter(1.0))
            panes[1].grid(False, axis="y")
            _title(panes[1], "Share of tokens by crawl", theme)
        return figure

    return draw


def _span(bars: Sequence[Bar], levels: Sequence[Line]) -> tuple[float, float]:
    points = [mark.value for bar in bars for mark in bar.marks] + [level.value for level in levels]
    points += [bar.value + sign * (bar.stderr or 0) for bar in bars for sign in (-1, 1)]
    margin = 0.05 * (max(points) - min(points)) + 0.01
    return min(points) - margin, max(points) + margin


def _figure(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, theme)
    return figure, axes


def _pair(theme: Theme) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    panes = [figure.add_subplot(1, 2, n) for n in (1, 2)]
    for axes in panes:
        _dress(axes, theme)
    return figure, panes


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.grid(True, color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9, color=theme.muted)


def _plot_curve(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    x, y = thin(curve.points)
    if curve.smooth and len(y) >= 60:
        axes.plot(x, y, color=colour, lw=0.7, alpha=0.3)
        axes.plot(x, running_mean(y), color=colour, lw=1.8, label=name)
    else:
        axes.plot(x, y, color=colour, lw=1.6, label=name)


def thin(points: Points, most: int = 4000) -> Points:
    """At most so many points, evenly taken: more than a figure has pixels cost time and say nothing."""
    stride = max(1, math.ceil(len(points[0]) / most))
    return points[0][::stride], points[1][::stride]


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Centred mean over a fiftieth of the run (at least 5 values); of a skipped step the loss may be no number.

    The window shrinks towards the start, where curves fall, and loses its right half towards the end.
    """
    data = np.asarray(values, dtype=float)
    finite = np.isfinite(data)
    sums, counts = (np.concatenate([[0], np.cumsum(part)]) for part in (np.where(finite, data, 0.0), finite))
    at = np.arange(len(data))
    half = np.minimum(at, max(2, len(data) // 100))
    last = np.minimum(at + half, len(data) - 1)
    count = counts[last + 1] - counts[at - half]
    return np.where(count > 0, (sums[last + 1] - sums[at - half]) / np.maximum(count, 1), np.nan)


def _fit_loss(axes: Axes, curves: Sequence[Curve], lines: Sequence[Line]) -> None:
    """A long run's first steps, which fall from about 11, would squeeze all the rest into the lower edge."""
    shown = [line.value for line in lines]
    for curve in curves:
        count = len(curve.points[1])
        start = count // 15 if count > 500 else 0
        since = curve.points[0][start] if count else 0
        shown += list(curve.points[1])[start:]
        shown += [y for x, y in zip(*curve.dots, strict=True) if x >= since]
    shown = [value for value in shown if math.isfinite(value)]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) + 0.02
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _levels(axes: Axes, lines: Sequence[Line], theme: Theme, curves: int) -> None:
    """Dashed levels in the colours that so many runs and their dots leave; of one colour, by their dashes."""
    colours = theme.series[max(2, curves) :] or theme.series
    for number, line in enumerate(lines):
        turn, place = divmod(number, len(colours))
        _level(axes, line, colours[place], DASHES[turn % len(DASHES)])


def _level(axes: Axes, line: Line, colour: str, dashes: tuple[float, ...]) -> None:
    """Named with its value in the legend."""
    name = f"{line.name}: {line.value:.2f}" if line.value >= 1 else f"{line.name}: {line.value:.1%}"
    axes.axhline(line.value, color=colour, lw=1.4, ls=(0, dashes), zorder=1, label=name)


def _title(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", color=theme.ink, fontweight="bold", fontsize=11)


def _legend(axes: Axes, theme: Theme, where: str) -> None:
    axes.legend(  # type: ignore[call-overload]
        loc=where,
        labelcolor=theme.ink,
        fontsize=8.5,
        facecolor=theme.paper,
        edgecolor="none",
        framealpha=0.85,
    )


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(amount))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(left=0)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    positive = [v for v in values if 0 < v < math.inf]
    if positive and max(positive) > 30 * float(np.median(positive)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(amount))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def amount(value: float, _: int | None = None) -> str:
    """Three digits and a letter, as 1.56B; with the place of a tick, as matplotlib asks for it."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _scientific(value: float, _: int | None = None) -> str:
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10**power:.3g}e{power}"
