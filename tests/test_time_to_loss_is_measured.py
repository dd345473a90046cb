"""The time-to-loss benchmark: what it counts, what it trains on, and that no run is made twice."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from tiny_pipeline import ROOT

from benchmarks import time_to_loss
from benchmarks.token_corpora import prepare
from storage.shards import open_shard, shard_paths
from storage.tokenizer import EOT, encode
from training.gpus import gpu_count, gpu_ids
from training.recipes import recipe


def result(variant: str = "base", seed: int = 1, **changes: Any) -> dict[str, Any]:
    losses = {"0": 10.9, "25": 5.0, "50": 4.7, "75": 4.5}
    made = {"variant": variant, "seed": seed, "losses": losses, "seconds_until": {s: int(s) * 0.2 for s in losses}}
    return made | {"final_loss": 4.5, "seconds": 15.0, "tokens_per_second": 6e5, "peak_gib": 12.5} | changes


def test_steps_that_compile_count_as_the_ones_after_them() -> None:
    assert time_to_loss.step_seconds([30.0, 5.0, 1.0, *[0.2] * 9, 0.4]) == pytest.approx([0.2] * 12 + [0.4])


def test_the_target_is_passed_at_a_validation_and_nothing_is_interpolated() -> None:
    assert time_to_loss.passed(result(), 4.789) == (50, 10.0)
    assert time_to_loss.passed(result(), 4.0) is None


def test_the_table_has_means_with_standard_errors_and_names_failures() -> None:
    results = [result(), result(seed=2, final_loss=4.7), {"variant": "high", "seed": 1, "failed": "exit status 1"}]
    lines = time_to_loss.table(results, 4.789).splitlines()
    assert "| base | 2 | 4.6000 ± 0.1000 | 15.0 ± 0.0 | 50 ± 0 | 10.0 ± 0.0 | 600,000 ± 0 | 12.5 ± 0.0 |" in lines
    assert "| high | 0 of 1 | - | - | - | - | - | - |" in lines and "  high, seed 1: exit status 1" in lines


def test_the_table_says_how_many_seeds_came_to_the_target() -> None:
    missed = [result(seed=seed, losses={"0": 10.9, "75": 5.1}) for seed in (2, 3)]
    line = time_to_loss.table([result(), *missed], 4.789).splitlines()[-1]
    assert "| 50 (1 of 3) | 10.0 (1 of 3) |" in line


def test_the_speed_recipes_rates_follow_from_the_batch_and_a_setting_comes_last() -> None:
    options = parsed("--batch-tokens=32768", "--steps=100", "--val-tokens=4096")
    config = time_to_loss.configure("modern:d4c512", ["head_lr=0.5"], 3, options)
    assert config.train.lr == pytest.approx(0.5 * recipe("modern:d4c512", ["batch_tokens=131072"]).train.lr)
    assert (config.train.head_lr, config.train.init_seed, config.train.order_seed) == (0.5, 3, 3)
    assert (config.train.val_sequences, config.train.steps, config.model.channels) == (4, 100, 512)
    short = time_to_loss.configure("modern:d4", ["context=64"], 1, parsed("--batch-tokens=512"))
    assert (short.model.context, short.train.batch_tokens) == (64, 512)
    gpt2 = time_to_loss.configure("gpt2-124m", [], 1, options)
    assert (gpt2.train.lr, gpt2.train.warmup_steps) == (6e-4, 10)
    assert time_to_loss.configure("gpt2-124m", ["steps=600"], 1, options).train.warmup_steps == 60
    assert time_to_loss.configure("gpt2-124m", ["warmup_steps=30"], 1, options).train.warmup_steps == 30


def parsed(*words: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["time_to_loss", "--corpus", "x", *words])
        return time_to_loss.arguments()


def test_no_seeds_are_no_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--seeds=0")
    assert "--seeds 0 must be at least 1" in capsys.readouterr().err


def test_parquet_is_read_in_order_with_eot_before_each_document(tmp_path: Path) -> None:
    for name, texts in (("000.parquet", ["One text.", "Two"]), ("001.parquet", ["Three more words"])):
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    corpora = prepare(str(tmp_path), str(tmp_path / "001.parquet"), 0, tmp_path / "runs")
    expected = [t for text in ("One text.", "Two", "Three more words") for t in (EOT, *encode(text))]
    assert open_shard(shard_paths(corpora.folder, "train")[0]).tolist() == expected
    assert corpora.val_tokens == 1 + len(encode("Three more words"))


def test_a_split_cuts_the_last_training_tokens_off_and_content_names_corpora(tmp_path: Path) -> None:
    shards = tiny_run.tokens(tmp_path / "tokens")
    whole = prepare(shards, shards, 0, tmp_path / "a")
    split = prepare(shards, "", 100, tmp_path / "b")
    last = open_shard(shard_paths(shards, "train")[-1])
    assert (split.train_tokens, split.val_tokens) == (whole.train_tokens - 100, 100)
    assert np.array_equal(open_shard(shard_paths(split.folder, "val")[0]), last[-100:])
    assert split.train != whole.train and split.val != whole.val
    assert prepare(shards, shards, 0, tmp_path / "elsewhere").named() == whole.named()
    with pytest.raises(ValueError, match="--split 800 leaves nothing of .*, which holds 800 training tokens"):
        prepare(shards, "", 800, tmp_path / "c")
    with pytest.raises(ValueError, match="absent.bin does not exist"):
        prepare("absent.bin", "", 400, tmp_path / "c")


@pytest.mark.parametrize("held_out", [400, 500])
def test_a_split_may_be_longer_than_the_last_shard(held_out: int, tmp_path: Path) -> None:
    shards = tiny_run.tokens(tmp_path / "tokens")
    split = prepare(shards, "", held_out, tmp_path / "runs")
    whole = np.concatenate([open_shard(path) for path in shard_paths(shards, "train")])
    train = np.concatenate([open_shard(path) for path in shard_paths(split.folder, "train")])
    assert np.array_equal(train, whole[:-held_out])
    assert np.array_equal(open_shard(shard_paths(split.folder, "val")[0]), whole[-held_out:])


def test_training_tokens_are_never_the_validation_set_unasked(tmp_path: Path) -> None:
    shards = tiny_run.tokens(tmp_path / "tokens")
    assert prepare(shards, "", 0, tmp_path / "a").named() == prepare(shards, shards, 0, tmp_path / "b").named()
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"text": ["One text."]}), tmp_path / "texts/a.parquet")
    for corpus in (shard_paths(shards, "train")[0], str(tmp_path / "texts/a.parquet"), str(tmp_path / "texts")):
        with pytest.raises(ValueError, match="give --val or --split"):
            prepare(corpus, "", 0, tmp_path / "c")


def test_shards_that_were_moved_are_linked_anew(tmp_path: Path) -> None:
    before = prepare(tiny_run.tokens(tmp_path / "old"), "", 0, tmp_path / "runs")
    (tmp_path / "old").rename(tmp_path / "new")
    assert prepare(str(tmp_path / "new"), "", 0, tmp_path / "runs") == before


def test_a_part_of_a_users_gpus_stays_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5,")
    assert (gpu_ids(), gpu_count()) == (["2", "GPU-5"], 2)


def benchmark(place: Path, *words: str) -> list[str]:
    """The command, of runs that take a second each."""
    small = ["--steps=4", "--batch-tokens=1024", "--micro-batch=16", "--val-every=2", "--val-tokens=512", "--target=9"]
    small += ["--recipe=modern:d1c128", "--set", "context=64", "train.dtype=fp32", "vocab=256"]
    shards = tiny_run.tokens(place / "tokens", size=2_000)
    command = [sys.executable, "-m", "benchmarks.time_to_loss", "--corpus", shards, *small, *words]
    return [*command, "--runs", str(place / "runs"), "--json", str(place / "results/found.json")]


@pytest.mark.slow
def test_variants_are_trained_once_and_written_down(tmp_path: Path) -> None:
    command = benchmark(tmp_path, "--at-once=2", "--variant=base", "--variant=slower:lr=1e-3")
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=tiny_run.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "| slower | 1 | " in done.stdout
    found = json.loads((tmp_path / "results/found.json").read_text())
    assert {r["variant"]: list(r["losses"]) for r in found.values()} == {
        "base": ["0", "2", "4"],
        "slower": ["0", "2", "4"],
    }
    assert len({r["corpora"]["train"] for r in found.values()}) == 1
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
    assert len(done.stdout.splitlines()) == 5  # the second call trained nothing: corpora, head and two lines


@pytest.mark.slow
def test_ctrl_c_ends_the_running_training_and_keeps_what_was_whole(tmp_path: Path) -> None:
    command = benchmark(tmp_path, "--at-once=1", "--seeds=99")
    process = subprocess.Popen(command, cwd=ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True)
    results, logs, stopped = tmp_path / "results/found.json", tmp_path / "runs", []

    def stop_a_training() -> bool:
        """Keep one from its end, while those before it are written down."""
        whole = len(json.loads(results.read_text())) if results.exists() else 0
        for pid in tiny_run.children(process.pid) if 0 < whole == len([*logs.glob("*/output.log")]) - 1 else []:
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                if b"training.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
        return bool(stopped)

    try:
        tiny_run.wait_for(stop_a_training)
        process.send_signal(signal.SIGINT)  # as a terminal sends it, but to this process alone
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
        for training in stopped:
            with suppress(ProcessLookupError):  # the benchmark has ended it
                os.kill(training, signal.SIGKILL)
    assert process.returncode == 130 and "ended by Ctrl-C" in said
    assert len(json.loads(results.read_text())) == len([*logs.glob("*/output.log")]) - 1
    assert not Path(f"/proc/{stopped[0]}").exists()
