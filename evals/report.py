"""What came of a run, on one page? A self-contained index.html in light and dark, figures as PNG files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evals import reference, report_data, report_page, report_plots
from evals.comparison import Rows
from evals.report_plots import Bar, Curve, Line, Points
from storage import objects

MOST_BARS = 12  # of one suite in the figure of accuracies; the table has all


@dataclass(frozen=True)
class Baseline:
    """A model to compare with: the released GPT-2, its fine-tuned version, another run."""

    name: str
    scores: Mapping[str, Mapping[str, Any]]  # suite -> score JSON
    items: Mapping[str, Rows] = field(default_factory=dict)  # suite -> per-item rows


@dataclass(frozen=True)
class ReportData:
    """One run as plain data; whoever calls has read it from wherever it lies."""

    name: str
    config: Mapping[str, Any]  # config.json
    main_log: str = ""
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # suite -> score JSON
    items: Mapping[str, Rows] = field(default_factory=dict)  # suite -> per-item rows; scores are compared by them
    samples: str = ""  # written while training, in blocks headed by their step
    unicorns: str = ""  # the finished model's, from one prompt, in blocks headed by their number
    inspection: Mapping[str, Any] = field(default_factory=dict)  # what stands in the corpus, as inspection.json has it
    records: Sequence[Mapping[str, Any]] = ()  # of the run's outputs and of all that they were made from
    baselines: Sequence[Baseline] = ()

    @property
    def batch_tokens(self) -> int:
        return int(self.config["train"]["batch_tokens"])


@dataclass(frozen=True)
class MainLog:
    """llm.c's main.log by kind of line: step and value."""

    train: tuple[tuple[int, float], ...]
    lr: tuple[tuple[int, float], ...]
    norm: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    accuracy: tuple[tuple[int, float], ...]
    skipped: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Picture:
    name: str  # file name without its ending: "loss"
    caption: str
    png: Mapping[str, bytes]  # by theme


@dataclass(frozen=True)
class Report:
    files: tuple[str, ...]  # URLs, index.html first
    pictures: tuple[Picture, ...]


def parse_main_log(text: str) -> MainLog:
    """Raises ValueError naming a line that is no line of main.log."""
    found: dict[str, list[tuple[int, float]]] = {k: [] for k in ("trl", "lr", "norm", "tel", "eval", "skip")}
    for number, line in enumerate(text.splitlines(), start=1):
        words = [word.partition(":") for word in line.split()]
        if not words or words[0][0] != "s" or any(key not in found for key, _, _ in words[1:]):
            raise ValueError(f"main.log line {number} is {line!r}: expected `s:<step>` and key:number words")
        for key, _, value in words[1:]:
            found[key].append((int(words[0][2]), float(value)))
    return MainLog(*(tuple(found[key]) for key in ("trl", "lr", "norm", "tel", "eval", "skip")))


def build(runs: ReportData | Sequence[ReportData], out: str) -> Report:
    """Write OUT/index.html and OUT/<figure>-<theme>.png; several runs are overlaid, the first leads."""
    several = [runs] if isinstance(runs, ReportData) else list(runs)
    if not several:
        raise ValueError("a report needs at least one run")
    logs = [parse_main_log(run.main_log) for run in several]
    shown = pictures(several, logs)
    files = [objects.join(out, "index.html")]
    for picture in shown:
        for theme, png in picture.png.items():
            url = objects.join(out, f"{picture.name}-{theme}.png")
            objects.publish_bytes(url, png)
            files.append(url)
    page = report_page.page(several, logs, shown, comparisons(several))
    objects.publish_bytes(files[0], page.encode())
    return Report(tuple(files), tuple(shown))


def pictures(runs: Sequence[ReportData], logs: Sequence[MainLog]) -> list[Picture]:
    """The figures that the runs have data for."""
    shown = []
    if any(log.train for log in logs):
        accuracies = [_curve(run, log.accuracy) for run, log in zip(runs, logs, strict=True) if log.accuracy]
        wide = not accuracies
        shown.append(_loss(runs, logs, wide))
        if accuracies:
            drawing = report_plots.accuracy(accuracies, accuracy_lines(runs[0]))
            caption = "HellaSwag while training (completion protocol, normalised by tokens)"
            shown.append(Picture("hellaswag", caption, report_plots.render(drawing)))
        shown.append(_optimisation(runs, logs))
    if any(run.metrics for run in runs):
        shown.append(_throughput(runs))
    if any("attention_logit_max" in line for run in runs for line in run.metrics):
        shown.append(_stability(runs))
    shown += _score_pictures(_beside_others(runs))
    if corpus := report_data.drawing(runs[0].inspection):
        shown.append(Picture("data", report_data.CAPTION, report_plots.render(corpus)))
    return shown


def _score_pictures(run: ReportData) -> list[Picture]:
    shown = []
    if bars := score_bars(run):
        levels = [Line("chance, 25%", 0.25)] if all(_four_choices(bar) for bar in bars) else []
        drawing = report_plots.scores(run.name, bars, "Accuracy", levels)
        shown.append(Picture("scores", "Accuracies with their standard errors", report_plots.render(drawing)))
    if "core" in run.scores.get("core", {}).get("scores", {}):
        drawing = report_plots.scores(run.name, core_bars(run), "CORE: accuracy centred on chance", core_levels(run))
        shown.append(
            Picture("core", "CORE by task, centred: 0 is a guess, 100% is perfect", report_plots.render(drawing))
        )
    return shown


def live(run: ReportData) -> bytes:
    """The loss of a run that is going on, as a PNG small enough to be kept hundreds of times."""
    return report_plots.thumbnail(_loss_drawing([run], [parse_main_log(run.main_log)], wide=True))


def _loss(runs: Sequence[ReportData], logs: Sequence[MainLog], wide: bool) -> Picture:
    drawing = _loss_drawing(runs, logs, wide)
    return Picture("loss", "Training and validation loss against tokens", report_plots.render(drawing))


def _loss_drawing(runs: Sequence[ReportData], logs: Sequence[MainLog], wide: bool) -> report_plots.Drawing:
    curves = [
        Curve(run.name, _points(run, log.train), _points(run, log.validation), smooth=True)
        for run, log in zip(runs, logs, strict=True)
    ]
    return report_plots.loss(curves, loss_lines(runs[0]), wide)


def _optimisation(runs: Sequence[ReportData], logs: Sequence[MainLog]) -> Picture:
    pairs = list(zip(runs, logs, strict=True))
    norms = [Curve(run.name, _points(run, log.norm), smooth=True) for run, log in pairs]
    skipped = {step for step, _ in logs[0].skipped}
    at = _points(runs[0], [(step, norm) for step, norm in logs[0].norm if step in skipped])
    drawing = report_plots.optimisation([_curve(run, log.lr) for run, log in pairs], norms, at)
    return Picture("optimisation", "Learning rate, gradient norm and skipped updates", report_plots.render(drawing))


def _throughput(runs: Sequence[ReportData]) -> Picture:
    speeds = [Curve(run.name, _metric(run, "tokens_per_second"), smooth=True) for run in runs]
    uses = [Curve(run.name, _metric(run, "mfu"), smooth=True) for run in runs]
    drawing = report_plots.throughput(speeds, uses)
    return Picture("throughput", "Speed of training", report_plots.render(drawing))


def _stability(runs: Sequence[ReportData]) -> Picture:
    logits, sizes = (
        [Curve(run.name, _largest(run, name)) for run in runs] for name in ("attention_logit_max", "activation_rms")
    )
    caption = "Stability: the layers' extremes, looked at every so many steps"
    return Picture("stability", caption, report_plots.render(report_plots.stability(logits, sizes)))


def _largest(run: ReportData, name: str) -> Points:
    """Over the layers, at the steps that were looked at."""
    return _points(run, [(int(m["step"]), max(m[name])) for m in run.metrics if m.get(name)])


def _points(run: ReportData, values: Sequence[tuple[int, float]]) -> Points:
    """Against tokens: what is logged at step s was measured on weights that had seen s batches."""
    return [step * run.batch_tokens for step, _ in values], [value for _, value in values]


def _curve(run: ReportData, values: Sequence[tuple[int, float]]) -> Curve:
    return Curve(run.name, _points(run, values))


def _metric(run: ReportData, name: str) -> Points:
    return _points(run, [(int(m["step"]), float(m[name])) for m in run.metrics if m.get(name) is not None])


def loss_lines(run: ReportData) -> list[Line]:
    """Baselines whose loss was measured here on as many tokens; published losses are of other shards."""
    ours = run.scores.get("validation_loss")
    lines = []
    for baseline in run.baselines:
        page = baseline.scores.get("validation_loss")
        if page and (ours is None or _same_text(page, ours)):
            lines.append(Line(baseline.name, page["scores"]["loss"]["value"]))
    return lines


def _same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["protocol"] == other["protocol"] and one["details"]["tokens"] == other["details"]["tokens"]


def accuracy_lines(run: ReportData) -> list[Line]:
    """GPT-2 and GPT-3 of the same size, as in the discussion's second pane."""
    lines = []
    for family, score in (("gpt2", "plot_line"), ("gpt3", "zero_shot")):
        model = reference.same_size(size_class(run.config["model"]), family)
        if model:
            lines.append(Line(reference.NAMES[model], reference.published("hellaswag", score)[model].value))
    return lines


def parameters(model: Mapping[str, Any]) -> int:
    """GPT-2's head is tied to the token embeddings; the speed recipe's model has matrices alone, and its own head."""
    layers, width = model["layers"], model["channels"]
    vocab = model.get("vocab", 50257)
    if model.get("family", "gpt2") == "nanochat":
        return layers * 12 * width**2 + 2 * vocab * width
    return (vocab + model["context"]) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def size_class(model: Mapping[str, Any]) -> int:
    """Parameters by which it is compared with a GPT-2: a table that is only looked up takes no products."""
    looked_up = model.get("vocab", 50257) * model["channels"] if model.get("family", "gpt2") == "nanochat" else 0
    return parameters(model) - looked_up


def score_bars(run: ReportData) -> list[Bar]:
    """The accuracies of the run, with what others got in the same score."""
    found = _compared(run)[::-1]
    bars = []
    for suite, page in run.scores.items():
        for name in _headlines(page):
            score, same = page["scores"][name], [c for c in found if (c.suite, c.score) == (suite, name)]
            marks = {c.against: Line(c.against, c.reference) for c in same}  # of two sources' numbers the first
            bars.append(Bar(f"{suite}: {name}".replace("_", " "), score["value"], score["stderr"], (*marks.values(),)))
    return bars


def _headlines(page: Mapping[str, Any]) -> list[str]:
    """A suite's own choice of scores, or its accuracies, as many as can be read."""
    chosen = page.get("details", {}).get("average_of") or [name for name in page["scores"] if "acc" in name]
    return chosen[:MOST_BARS]


def core_bars(run: ReportData) -> list[Bar]:
    """The best task first."""
    centred = {n: s for n, s in run.scores["core"]["scores"].items() if n.endswith("/centred")}
    best = sorted(centred, key=lambda name: -centred[name]["value"])
    return [Bar(n.removesuffix("/centred").replace("_", " "), centred[n]["value"], centred[n]["stderr"]) for n in best]


def core_levels(run: ReportData) -> list[Line]:
    """The mean, and the released GPT-2 of the same size and the largest one: GPT-2 grade."""
    ours = run.scores["core"]["scores"]["core"]["value"]
    published = reference.published("core", "core")
    same = reference.same_size(size_class(run.config["model"]), "gpt2")
    models = dict.fromkeys([same, "gpt2-xl"] if same else ["gpt2-xl"])
    lines = [Line(f"{reference.NAMES[m]}: {published[m].value:.1%}", published[m].value) for m in models]
    return [Line(f"CORE of {run.name}: {ours:.1%}", ours), *lines]


def _four_choices(bar: Bar) -> bool:
    return bar.name.split(":")[0] in ("hellaswag", "completion demo") or "completion items" in bar.name


def comparisons(runs: Sequence[ReportData]) -> list[reference.Comparison]:
    """The leading run against published numbers of its size, its baselines and the other runs."""
    return _compared(_beside_others(runs))


def _compared(run: ReportData) -> list[reference.Comparison]:
    """Against published numbers of its size, then its baselines."""
    model = reference.same_size(size_class(run.config["model"]), "gpt2")
    rows = reference.against_published(run.scores, model) if model else []
    for baseline in run.baselines:
        rows += reference.against_run(run.scores, baseline.scores, baseline.name, run.items, baseline.items)
    return rows


def _beside_others(runs: Sequence[ReportData]) -> ReportData:
    """The leading run, the others standing beside it as its baselines do."""
    others = [Baseline(run.name, run.scores, run.items) for run in runs[1:]]
    return replace(runs[0], baselines=[*runs[0].baselines, *others])
