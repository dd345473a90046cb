"""The ledger of a run: all that was paid for counts, useful or not; what can't be read is absent, never 0."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_pipeline import ROOT, copied, gpt2
from tiny_ui import wait_for

from assets.card import outputs_of
from assets.making import Maker, _cost
from assets.model import _training_metadata
from assets.report import report_data
from assets.resources import Launcher, Silent
from evals.report import build
from storage import objects
from storage.lineage import Lineage
from storage.places import places
from storage.records import Record, read_record, write_record
from training import attempts
from training.energy import EnergyMeter
from training.metrics import RunLog, ledger


def train(folder: Path, log: RunLog, steps: range, joules: float | None = None, skipped: int = 0) -> None:
    for step in steps:
        log.training(step, 3.0, 1e-3, 1.0)
        log.metrics(step, seconds=2.0, joules=joules, skipped=skipped)


def test_an_undisturbed_run_has_lost_nothing(tmp_path):
    train(tmp_path, RunLog(str(tmp_path), 0), range(5), joules=100.0)
    whole = {"seconds": 10.0, "joules": 500.0, "goodput": 1.0, "restarts": 0, "rewinds": 0, "skipped_updates": 0}
    assert ledger(tmp_path) == whole
    assert not (tmp_path / "lost.jsonl").exists()


def test_steps_that_were_done_again_or_thrown_away_were_paid_for(tmp_path):
    train(tmp_path, RunLog(str(tmp_path), 0), range(6), joules=100.0)
    log = RunLog(str(tmp_path), 4)  # killed; its checkpoint is of step 4
    train(tmp_path, log, range(4, 8), joules=100.0)
    log.cut_back(6, "rewind")
    train(tmp_path, log, range(6, 8), joules=100.0, skipped=1)
    told = ledger(tmp_path)
    assert told.pop("goodput") == pytest.approx(8 / 12)
    assert told == {"seconds": 24.0, "joules": 1200.0, "restarts": 1, "rewinds": 1, "skipped_updates": 1}


def test_a_restart_that_lost_no_step_counts(tmp_path):
    train(tmp_path, RunLog(str(tmp_path), 0), range(3))
    train(tmp_path, RunLog(str(tmp_path), 3), range(3, 5))
    assert (ledger(tmp_path)["restarts"], ledger(tmp_path)["goodput"]) == (1, 1.0)


def test_the_wall_clock_of_every_launch_is_paid_for(tmp_path):
    """Steps are the least of it here. A launch that is killed counts as long as it was seen at work."""
    train(tmp_path, RunLog(str(tmp_path), 0), range(2))
    program = "from pathlib import Path; import sys, time; from training import attempts; attempts.NOTE_SECONDS = 0.05"
    program += "\nwith attempts.noted(Path(sys.argv[1])): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as killed:
        wait_for("a second note", lambda: any(a["seconds"] > 0.1 for a in attempts.read(tmp_path)))
        killed.kill()
    (before,) = attempts.read(tmp_path)
    objects.publish_json(str(tmp_path / attempts.FILE), [before | {"seconds": 5.0}])
    assert ledger(tmp_path)["seconds"] == 5.0
    began = time.monotonic()
    with attempts.noted(tmp_path):
        wait_for("the first note", lambda: len(attempts.read(tmp_path)) == 2)
        objects.publish_json(str(tmp_path / attempts.FILE), [before | {"seconds": 50.0}])  # as the mirror brings it
    first, second = attempts.read(tmp_path)
    assert first["seconds"] == 50.0 and 0 < second["seconds"] <= time.monotonic() - began
    told = ledger(tmp_path)
    assert (told["seconds"], told["goodput"]) == (first["seconds"] + second["seconds"], 1.0)


@pytest.mark.slow
def test_the_launcher_notes_what_it_took(tmp_path):
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(steps=2))
    assert tiny_run.train(run, tiny_run.tokens(tmp_path / "tokens")).returncode == 0
    (attempt,) = attempts.read(Path(run))
    steps = [json.loads(line)["seconds"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert attempt["seconds"] > sum(steps) + 0.5  # torch alone takes longer to load


def test_energy_that_is_not_known_throughout_is_absent(tmp_path):
    train(tmp_path, RunLog(str(tmp_path), 0), range(3), joules=100.0)
    train(tmp_path, RunLog(str(tmp_path), 3), range(3, 5), joules=None)
    assert ledger(tmp_path)["joules"] is None


def test_a_cpu_tells_no_energy():
    meter = EnergyMeter(torch.device("cpu"))
    assert meter.joules() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_its_energy():
    """Between what an idle card takes and the most that one can."""
    meter = EnergyMeter(torch.device("cuda", 0))
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(1000):
        square @ square
    end.record()
    torch.cuda.synchronize()
    joules, seconds = meter.joules(), start.elapsed_time(end) / 1000
    assert joules is not None and 30 * seconds < joules < 1500 * (seconds + 0.5)


def test_energy_that_was_read_is_told_in_the_lineage_the_report_and_dagster(finished, tmp_path):
    """As a GPU run's record would have it."""
    store = copied(finished.store, tmp_path)
    record = read_record(store, "runs/tiny")
    assert record is not None
    record = replace(record, cost=record.cost | {"joules": 1234.0})
    write_record(store, record)
    place = places(store)
    Lineage(place.lineage).ingest(store)
    assert {c.joules for c in Lineage(place.lineage, store).cost("tiny")} == {1234.0, None}
    maker = Maker(place, Launcher(), Silent())
    config, folder = maker.run_config("tiny"), maker.folder("runs/tiny")
    assert _training_metadata(folder, "tiny", config, record)["joules"] == 1234.0
    page = report_data(maker, "tiny", outputs_of(maker, "tiny"), [])
    build([page], str(tmp_path / "page"))
    assert "1,234 J" in (tmp_path / "page/index.html").read_text()


def test_a_finished_runs_cost_is_in_its_record_and_shown(finished, tmp_path):
    record = read_record(finished.store, "runs/tiny")
    assert record is not None
    cost = {name: value for name, value in record.cost.items() if name != "seconds"}
    assert cost == {
        **{"gpu_hours": 0.0, "dollars": None, "joules": None},  # no price was told
        **{"goodput": 1.0, "restarts": 0, "rewinds": 0, "skipped_updates": 0},
    }
    told = json.loads(gpt2("lineage", "cost", "tiny", "--store", finished.store, "--json", cwd=tmp_path).stdout)
    stages = {"documents", "token_shards", "trained_model", "hf_model", "samples", "validation_loss", "report"}
    assert stages <= {row["job"] for row in told}
    (weights,) = [row for row in told if row["key"] == "runs/tiny"]
    assert (weights["goodput"], weights["restarts"], weights["joules"]) == (1.0, 0, None)
    assert {row["dollars"] for row in told} == {None}
    steps = Path(finished.store, "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert {json.loads(step)["cost"] for step in steps} == {None}
    page = Path(finished.store, "runs/tiny/report/index.html").read_text()
    assert "useful steps of all paid" in page and "100.0%" in page


def test_dollars_are_told_where_a_price_is(tmp_path):
    assert _cost(1800.0, 8, 2.5)["dollars"] == 10.0
    assert _cost(1800.0, 8, 0.0)["dollars"] is None
    cost = _cost(1800.0, 8, 0.0) | {"dollars": 0.0}  # as before
    former = Record("a", "runs/r", "f", "1", {}, [], [], "2026-11-24T10:00:00", "2026-11-24T11:00:00", cost=cost)
    write_record(str(tmp_path), former)
    index = Lineage(tmp_path / "lineage.duckdb")
    index.ingest(str(tmp_path))
    assert [(c.gpu_hours, c.dollars) for c in index.cost("runs/r")] == [(4.0, None)]
