"""A run goes on from its newest complete checkpoint as if it had never stopped, or says why it will not."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from storage import records
from storage.checkpoints import complete
from training.checkpoint import Keep
from training.config import RunConfig, to_dict
from training.train import find_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-masters": {"dtype": "bf16"},
    "bf16-stochastic-rounding": {"dtype": "bf16", "master_weights": False},
    "outlier-windows": {"steps": 150, "skip_loss_z": 0.1, "skip_grad_z": 0.1, "val_every": 0},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.tokens(tmp_path_factory.mktemp("tokens"))


def with_micro_batch(config: RunConfig, micro_batch: int) -> RunConfig:
    return replace(config, machine=replace(config.machine, micro_batch=micro_batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_one_that_never_stopped(variant: str, shards: str, tmp_path: Path) -> None:
    config = with_micro_batch(tiny_run.config(**VARIANTS[variant]), 2)  # four micro-steps
    whole, parts = (tiny_run.folder(tmp_path / name, config) for name in ("whole", "parts"))
    trainer = tiny_run.steps(whole, shards)
    for until in (1, config.train.steps - 3):
        tiny_run.steps(parts, shards, until)
    tiny_run.steps(parts, shards)
    assert Path(parts, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert tiny_run.losses(parts) == tiny_run.losses(whole)
    assert tiny_run.final_files(parts) == tiny_run.final_files(whole)
    if variant == "outlier-windows":
        assert trainer.progress.skipped > 0
        assert Path(whole, "main.log").read_text().count(" skip:") == trainer.progress.skipped


def test_at_another_micro_batch_the_losses_agree_and_the_log_says_so(shards: str, tmp_path: Path) -> None:
    whole, parts = (tiny_run.folder(tmp_path / name, tiny_run.config()) for name in ("whole", "parts"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(parts, shards, until=3)
    other = with_micro_batch(tiny_run.config(), 2)
    Path(parts, "config.json").write_text(json.dumps(to_dict(other)))
    tiny_run.steps(parts, shards)
    assert tiny_run.losses(parts) == pytest.approx(tiny_run.losses(whole), abs=1e-5)


def test_lines_past_the_checkpoint_are_dropped_and_torn_checkpoints_passed_over(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run.config(checkpoint_every=2, keep_checkpoints=5)
    whole, torn = (tiny_run.folder(tmp_path / name, config) for name in ("whole", "torn"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(torn, shards)
    for step in (4, 6):
        Path(torn, f"checkpoints/step_{step:06d}/DONE").unlink()
    Path(torn, "checkpoints/.step_000006").mkdir()
    with Path(torn, "main.log").open("a") as log:
        log.write("s:6 tr")  # the end of a machine
    assert complete(torn) == [2]
    with caplog.at_level("WARNING"):
        tiny_run.steps(torn, shards)
    assert "passed over step_000004" in caplog.text
    assert Path(torn, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert tiny_run.final_files(torn) == tiny_run.final_files(whole)


def test_another_configuration_is_refused_with_the_difference(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    Path(run, "config.json").write_text(json.dumps(to_dict(tiny_run.config(lr=5e-3, val_every=3))))
    with pytest.raises(ValueError, match=r"train\.lr was 0\.01, now 0\.005") as refused:
        tiny_run.steps(run, shards)
    assert "val_every" not in str(refused.value)  # it leaves the weights as they are
    tiny_run.steps(run, shards, until=4, resume="anyway")
    assert complete(run)[-1] == 4


@pytest.mark.slow
def test_asked_not_to_resume_it_begins_anew(shards: str, tmp_path: Path) -> None:
    whole, again = (tiny_run.folder(tmp_path / name, tiny_run.config()) for name in ("whole", "again"))
    tiny_run.steps(whole, shards)
    other = tiny_run.config(lr=5e-3)
    Path(again, "config.json").write_text(json.dumps(to_dict(other)))
    tiny_run.steps(again, shards, until=3)
    Path(again, "config.json").write_text(json.dumps(to_dict(tiny_run.config())))
    done = tiny_run.train(again, shards, 1, "--begin-anew")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "beginning anew: dropping the checkpoints of steps [3]" in Path(again, "train.log").read_text()
    assert tiny_run.losses(again) == pytest.approx(tiny_run.losses(whole), abs=1e-5)


def test_another_trainer_or_torch_is_refused(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    path = Path(run, "checkpoints/step_000003/state.json")
    state = json.loads(path.read_text())
    state["definition"]["torch"] = "1.0"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"torch was 1\.0, now"):
        tiny_run.steps(run, shards)


def test_the_newest_checkpoints_and_the_major_ones_stay(shards: str, tmp_path: Path) -> None:
    config = tiny_run.config(steps=9, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    run = tiny_run.folder(tmp_path / "run", config)
    tiny_run.steps(run, shards)
    assert complete(run) == [4, 8, 9]
    assert Keep(2, every=4).drops([0, 4, 8, 9]) == [0]  # of a run that was stopped before its first step


def test_a_finished_run_is_left_as_it_is(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards)
    shutil.copytree(run, tmp_path / "before")
    tiny_run.steps(run, shards)
    assert Path(run, "main.log").read_text() == (tmp_path / "before/main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(str(tmp_path / "before"))


def test_the_time_that_a_save_stops_the_steps_is_written_down(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(checkpoint_every=3))
    with caplog.at_level("INFO"):
        tiny_run.steps(run, shards)
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["save_seconds"] > 0] == [3]  # the step after it
    held_up = f"{lines[3]['save_seconds']:.3f}"
    assert f"step 3 is being saved: the copy to host memory held it up for {held_up} s" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sample_that_fails_leaves_the_checkpoint_of_its_step(ranks: int, shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(checkpoint_every=4, sample_every=4))
    Path(run, "samples.txt").mkdir()  # nothing can be written there
    done = tiny_run.train(run, shards, ranks)
    assert done.returncode == 1 and "IsADirectoryError" in done.stderr
    assert complete(run) == [4]


def test_the_commit_of_a_checkpoint_is_reported_and_not_compared(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    path = Path(run, "checkpoints/step_000003/state.json")
    state = json.loads(path.read_text())
    assert state["commit"] == records.code_state()[0]
    path.write_text(json.dumps({**state, "commit": "c0ffee"}))
    with caplog.at_level("INFO"):
        tiny_run.steps(run, shards, until=4)
    assert "written by commit c0ffee, this is" in caplog.text


def test_where_no_checkpoint_can_be_written_training_does_not_begin(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(checkpoint_every=1))
    (tmp_path / "run/checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        tiny_run.steps(run, shards)
    assert not (tmp_path / "run/main.log").exists()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_it_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damaged", [flip_a_byte, cut_it_short, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer_00000_of_00001.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damaged: Any, file: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run.config(checkpoint_every=2)
    whole, run = (tiny_run.folder(tmp_path / name, config) for name in ("whole", "run"))
    tiny_run.steps(whole, shards)
    tiny_run.steps(run, shards, until=5)
    damaged(Path(run, "checkpoints/step_000005", file))
    find_checkpoint(run, None)
    assert complete(run) == [4] and f"step_000005: {file} " in caplog.text
    tiny_run.steps(run, shards)
    assert Path(run, "main.log").read_text() == Path(whole, "main.log").read_text()
    assert tiny_run.final_files(run) == tiny_run.final_files(whole)


def test_what_tells_that_a_checkpoint_is_whole_may_be_damaged_too(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(checkpoint_every=2))
    tiny_run.steps(run, shards, until=5)
    cut_it_short(Path(run, "checkpoints/step_000005/DONE"))
    find_checkpoint(run, None)
    assert complete(run) == [4]


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_begin_anew_unasked(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    flip_a_byte(Path(run, "checkpoints/step_000003/model.safetensors"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"are damaged \(step_000003\).*or begin anew with --set resume=no"):
            find_checkpoint(run, None)


@pytest.mark.slow
def test_no_rank_waits_for_a_first_one_that_refuses(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    flip_a_byte(Path(run, "checkpoints/step_000003/model.safetensors"))
    began = time.monotonic()
    done = tiny_run.train(run, shards, 2)
    assert done.returncode == 2 and "are damaged (step_000003)" in done.stderr
    assert time.monotonic() - began < 100  # torchrun would kill them after 120 s


def test_a_checkpoint_of_a_version_that_wrote_no_digests_is_gone_on_from(shards: str, tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config())
    tiny_run.steps(run, shards, until=3)
    Path(run, "checkpoints/step_000003/DONE").write_text("")
    find_checkpoint(run, None)
    assert complete(run) == [3]
