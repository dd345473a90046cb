"""The report: one file that needs no other, in both themes, with what the run has and nothing else."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from evals import report_plots
from evals.report import (
    Baseline,
    ReportData,
    accuracy_lines,
    build,
    core_bars,
    core_levels,
    live,
    loss_lines,
    parameters,
    parse_main_log,
    score_bars,
)

LOG = """s:0 tel:10.9
s:0 trl:10.95 lr:1e-4 norm:3.1
s:1 trl:9.1 lr:2e-4 norm:2.2
s:1 skip:6.4
s:2 tel:8.8
s:2 eval:0.251
"""
CONFIG = {
    "recipe": "demo", "corpus": "embedded",
    "model": {"layers": 12, "channels": 768, "heads": 12, "context": 1024, "vocab": 50257},
    "train": {"steps": 2, "batch_tokens": 2048, "lr": 2e-4},
}  # fmt: skip


def score(value: float, stderr: float | None = 0.01) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 100}


def page(scores: dict[str, Any], suite: str, tokens: int = 25_000) -> dict[str, Any]:
    return {"suite": suite, "protocol": "p", "scores": scores, "truncated": 0, "details": {"tokens": tokens}}


def record(key: str, *parents: str) -> dict[str, Any]:
    return {
        "asset": key.split("/")[0], "key": key, "fingerprint": key.encode().hex(), "rows": 3, "tokens": None,
        "parents": [{"key": p, "fingerprint": ""} for p in parents], "files": [{"path": "a", "bytes": 1500}],
        "cost": {"seconds": 12.0}, "commit": "0123456789ab", "dirty": True, "ended": "2026-01-02T03:04:05",
        "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "x"},
    }  # fmt: skip


def run(name: str = "demo", **given: Any) -> ReportData:
    scores = {
        "hellaswag": page({"completion_acc_norm": score(0.29)}, "hellaswag"),
        "validation_loss": page({"loss": score(3.3)}, "validation_loss"),
    }
    facts: dict[str, Any] = {
        "config": CONFIG, "main_log": LOG, "metrics": [{"step": 0, "tokens_per_second": 1900.0, "mfu": None}],
        "scores": scores, "samples": "=== step 2 ===\nA <b>unicorn</b> & more\n",
        "records": [record("corpora/c"), record("tokens/c", "corpora/c"), record("runs/demo", "tokens/c")],
    }  # fmt: skip
    return ReportData(name, **{**facts, **given})


def test_main_log_is_read_as_llm_c_writes_it() -> None:
    log = parse_main_log(LOG)
    assert log.train == ((0, 10.95), (1, 9.1))
    assert log.lr == ((0, 1e-4), (1, 2e-4))
    assert log.norm == ((0, 3.1), (1, 2.2))
    assert log.validation == ((0, 10.9), (2, 8.8))
    assert log.accuracy == ((2, 0.251),)
    assert log.skipped == ((1, 6.4),)


@pytest.mark.parametrize("line", ["step 3 loss 2.1", "s:3 foo:2", "trl:3.0"])
def test_another_line_in_main_log_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="main.log line 7 is"):
        parse_main_log(LOG + line + "\n")


def test_the_page_needs_no_other_file_and_has_both_themes(tmp_path: Path) -> None:
    report = build(run(), str(tmp_path))
    text = (tmp_path / "index.html").read_text()
    links = re.findall(r"(?:src|href|srcset)=['\"]([^'\"]{1,30})|url\(([^)]{1,30})", text)
    assert all((a or b).startswith(("data:image/png;base64,", "#")) for a, b in links)
    assert "http://" not in text and "https://" not in text
    assert "prefers-color-scheme: dark" in text
    assert [p.name for p in report.pictures] == ["loss", "hellaswag", "optimisation", "throughput", "scores"]
    for picture in report.pictures:
        light, dark = (imread(io.BytesIO(picture.png[theme])) for theme in ("light", "dark"))
        assert light.shape == dark.shape
        assert light[0, 0, :3].mean() > 0.9 and dark[0, 0, :3].mean() < 0.2
        assert (tmp_path / f"{picture.name}-dark.png").read_bytes() == picture.png["dark"]


def test_the_page_says_what_the_run_is(tmp_path: Path) -> None:
    build(run(), str(tmp_path))
    text = (tmp_path / "index.html").read_text()
    assert "A &lt;b&gt;unicorn&lt;/b&gt; &amp; more" in text
    for fact in ("124M", "8.800", "from 10.900", "29.0%", "commit 0123456789 with local changes", "36.0 s"):
        assert fact in text, fact
    for key in ("corpora/c", "tokens/c", "runs/demo"):
        assert key in text
    assert "llm.c, dev/data/hellaswag.py" in text  # the published number stands beside the score, with its source


def test_a_run_without_scores_or_records_still_has_a_page(tmp_path: Path) -> None:
    report = build(run(scores={}, records=(), samples="", metrics=()), str(tmp_path))
    assert [p.name for p in report.pictures] == ["loss", "hellaswag", "optimisation"]
    assert "<h2>Samples</h2>" not in (tmp_path / "index.html").read_text()


def test_several_runs_share_the_figures_and_differing_settings_are_marked(tmp_path: Path) -> None:
    other = run("second", config={**CONFIG, "train": {**CONFIG["train"], "lr": 1e-3}})
    build([run("first"), other], str(tmp_path))
    text = (tmp_path / "index.html").read_text()
    assert "<h1>first · second</h1>" in text
    assert "<span class='differs'>0.001</span>" in text
    assert text.count("<span class='differs'>") == 2
    assert "What names no run is of first, the first." in text


def test_core_is_shown_by_task_beside_gpt2(tmp_path: Path) -> None:
    core = page({"core": score(0.2), "a": score(0.5), "a/centred": score(0.0), "b/centred": score(0.4)}, "core")
    data = run(scores={"core": core})
    assert [(bar.name, bar.value) for bar in core_bars(data)] == [("b", 0.4), ("a", 0.0)]
    assert [line.value for line in core_levels(data)] == [0.2, 0.1139, 0.256525]
    assert "core" in [p.name for p in build(data, str(tmp_path)).pictures]
    assert "GPT-2 1558M: .2565" in (tmp_path / "index.html").read_text()


def test_a_suite_with_an_average_shows_what_it_averages() -> None:
    scores = {f"mmlu_{n}/acc": score(0.3) for n in range(57)} | {"mmlu/acc": score(0.3), "arc/acc_norm": score(0.4)}
    suite = page(scores, "leaderboard-v1")
    suite["details"]["average_of"] = ["arc/acc_norm", "mmlu/acc"]
    names = [bar.name for bar in score_bars(run(scores={"leaderboard-v1": suite}))]
    assert names == ["leaderboard-v1: arc/acc norm", "leaderboard-v1: mmlu/acc"]


def test_loss_lines_are_only_those_measured_on_as_many_tokens() -> None:
    same = Baseline("GPT-2", {"validation_loss": page({"loss": score(3.4)}, "validation_loss")})
    other = Baseline("GPT-2 elsewhere", {"validation_loss": page({"loss": score(3.1)}, "validation_loss", 7)})
    assert [line.name for line in loss_lines(run(baselines=[same, other]))] == ["GPT-2"]


@pytest.mark.parametrize("curves, levels", [(1, 5), (3, 2), (3, 7), (5, 3), (7, 6)])
@pytest.mark.parametrize("pane", [report_plots.loss, report_plots.accuracy])
def test_every_run_and_level_is_drawn_and_told_apart(pane: Any, curves: int, levels: int) -> None:
    runs = [report_plots.Curve(f"run {n}", ([0, 1], [0.3, 0.3])) for n in range(curves)]
    lines = [report_plots.Line(f"model {n}", 0.3) for n in range(levels)]
    drawing = pane(runs, lines, True) if pane is report_plots.loss else pane(runs, lines)
    drawn = {str(line.get_label()): line for line in drawing(report_plots.LIGHT).axes[0].get_lines()}
    shown = [drawn[f"{line.name}: 30.0%"] for line in lines]
    assert len({(line.get_color(), line._unscaled_dash_pattern) for line in shown}) == levels
    if curves < 6:  # colours are left
        own = {line.get_color() for name, line in drawn.items() if name.startswith("run ") or name == "training"}
        assert not own & {line.get_color() for line in shown}


def test_the_layers_extremes_are_drawn_where_they_were_looked_at(tmp_path: Path) -> None:
    looked = {"attention_logit_max": [3.0, 7.5], "activation_rms": [1.0, 2.0]}
    report = build(run(metrics=({"step": 0, **looked}, {"step": 1})), str(tmp_path))
    assert "stability" in [p.name for p in report.pictures]


def test_a_speed_run_is_compared_with_the_gpt2_of_its_class() -> None:
    """A table that is only looked up counts as parameters, but not for the class."""
    model = {"layers": 12, "channels": 768, "heads": 6, "context": 1024, "family": "nanochat"}
    assert parameters(model) == 84_934_656 + 2 * 50_257 * 768
    assert [line.value for line in accuracy_lines(run(config=CONFIG | {"model": model}))][0] == 0.294463


def test_hellaswag_lines_are_those_of_models_of_the_same_size() -> None:
    assert [(line.name, line.value) for line in accuracy_lines(run())] == [
        ("GPT-2 124M", 0.294463),
        ("GPT-3 125M", 0.337),
    ]
    small = run(config={**CONFIG, "model": {**CONFIG["model"], "layers": 2, "channels": 64}})
    assert accuracy_lines(small) == []


@pytest.mark.parametrize("at", [0, 40, 99])
def test_a_step_without_a_finite_loss_leaves_the_figures_whole(at: int) -> None:
    """Its update was skipped and the training went on."""
    for value in (math.nan, math.inf):
        log = log_with({at: value})
        assert live(run(main_log=log)).startswith(b"\x89PNG")


def test_a_report_of_skipped_steps_has_all_its_figures(tmp_path: Path) -> None:
    log = log_with({0: math.nan, 40: math.inf, 99: math.nan})
    assert [p.name for p in build(run(main_log=log), str(tmp_path)).pictures][::2] == ["loss", "throughput"]


def log_with(values: dict[int, float]) -> str:
    """A main.log of 100 steps, some of them without a finite loss."""
    losses = [values.get(step, 10 - step / 20) for step in range(100)]
    lines = [f"s:{step} trl:{loss} lr:1e-4 norm:{loss}" for step, loss in enumerate(losses)]
    return "\n".join([*lines, *(f"s:{step} tel:{value}\ns:{step} skip:inf" for step, value in values.items())])


def test_the_running_mean_is_that_of_the_finite_values_around() -> None:
    values = np.random.default_rng(0).normal(size=100)
    values[[0, 40, 41, 99]] = math.nan, math.inf, -math.inf, math.nan
    smoothed, known = report_plots.running_mean(values.tolist()), np.where(np.isfinite(values), values, np.nan)
    for place in range(1, 100):
        half = min(place, 2)
        assert smoothed[place] == pytest.approx(np.nanmean(known[place - half : place + half + 1])), place
    assert math.isnan(smoothed[0])  # around it there is nothing but itself


INSPECTION = {
    "suites": {"hellaswag": {"items": 10_042, "contaminated": 1}},
    "contamination": {
        "items": 10_042, "contaminated": ["hellaswag 7"],
        "examples": [{"item": "hellaswag 7", "document": "<urn:uuid:1>", "words": "a b c"}],
    },
    "validation": {"items": 100, "contaminated": [], "examples": []},
    "duplicates": {"documents": 2_000, "exact": 3, "compared": 1_000, "near": 5},
    "lengths": {
        "documents": 2_000, "tokens": 1_000, "histogram": [[64, 1_500], [128, 500]],
        "quantiles": {"shortest": 64, "p10": 70, "median": 90, "p90": 140, "longest": 200},
        "tokens_by_dump": [["CC-MAIN-2024-10", 700], ["", 300]],
    },
}  # fmt: skip


def test_what_stands_in_the_corpus_is_shown_where_it_was_looked_at(tmp_path: Path) -> None:
    report = build(run(inspection=INSPECTION), str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    assert [p.name for p in report.pictures][-1] == "data"
    assert "of 10,042, by 13 words in a row" in page and "&lt;urn:uuid:1&gt;" in page and "0.50%" in page
    build(run(), str(tmp_path / "without"))
    assert "13 words" not in (tmp_path / "without" / "index.html").read_text()
