"""A run so small that tests can afford many: a 2-layer model over 256 tokens, and shards it can learn."""

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import HashStore

from storage import events
from storage.checkpoints import complete
from storage.objects import read_json
from storage.shards import shard_name, write_shard
from training.config import RunConfig, TrainConfig, from_dict, to_dict
from training.distributed import Group, World
from training.gpt2 import GPT2
from training.launch import INTERRUPTED
from training.model_config import ModelConfig
from training.train import Stop, Trainer

ROOT = Path(__file__).parent.parent


GPT2_MODEL = ModelConfig(layers=2, channels=32, heads=2, context=16, vocab=256)
MODERN_MODEL = ModelConfig(layers=3, channels=32, heads=2, context=16, vocab=256, family="nanochat")


def speedrun(**train: Any) -> RunConfig:
    """A tiny run of the speed recipe's kind; its three blocks do not divide into 2 or 4."""
    muon = {"optimizer": "muon", "lr": 0.02, "warmup_steps": 0, "schedule": "trapezoid", "clip": 0.0, "beta1": 0.8}
    return config(MODERN_MODEL, **{**muon, "neuron_beta2": 0.95, **train})


def config(model: ModelConfig = GPT2_MODEL, **train: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "steps": 6,
        "batch_tokens": 8 * 16,
        "lr": 1e-2,
        "warmup_steps": 2,
        "dtype": "fp32",
        "val_every": 2,
        "val_batches": 1,
        "val_sequences": 6,
        "sample_tokens": 4,
        "checkpoint_every": 1000,
    }
    return RunConfig(
        recipe="tiny",
        corpus="none",
        model=model,
        train=TrainConfig(**{**defaults, **train}),
    )


def tokens(folder: Path, shards: int = 3, size: int = 400) -> str:
    """Shards of a random walk over the vocabulary: the next token lies near the last."""
    folder.mkdir(exist_ok=True)
    steps = np.random.default_rng(0).integers(-2, 3, size=(shards, size))
    for index, walk in enumerate(steps.cumsum(axis=1) % 256):
        split = "train" if index else "val"
        write_shard(str(folder / shard_name("walk", split, index)), walk.astype(np.uint16))
    return str(folder)


def folder(path: Path, run: RunConfig) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(run)))
    return str(path)


def command(run: str, shards: str, ranks: int = 1, *options: str) -> list[str]:
    launch = [sys.executable, "-m", "training.launch", f"--gpus={ranks}"]
    return [*launch, "training.train", run, f"--tokens={shards}", *options]


def train(run: str, shards: str, ranks: int = 1, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run, shards, ranks, *options), cwd=ROOT, capture_output=True, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Steps:
    """The steps of a run as it takes them. It is never more than some 20 ahead of whoever waits for one: a pipe of a
    page holds no more, and the first rank waits until what it tells is read."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
        self.lines = open(reading, "rb", buffering=0)  # noqa: SIM115

    def start(self, program: list[str]) -> subprocess.Popen[str]:
        told = {**environment(), events.EVENTS_VARIABLE: "1"}
        return subprocess.Popen(program, cwd=ROOT, env=told, text=True, stdout=self.writing, stderr=subprocess.PIPE)

    def wait(self, run: str, step: int = 0) -> None:
        """Until the run has taken a step, and has a checkpoint."""
        os.close(self.writing)  # the processes have it
        while select.select([self.lines], [], [], 240)[0] and (line := self.lines.readline()):
            event = events.parse(line.decode())
            if event and event["event"] == "training_step" and event["step"] > step and complete(run):
                return
        raise AssertionError(f"no step {step} was taken")

    def let_go(self) -> None:
        """Have the run go on as fast as it can."""
        self.lines.close()


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def final_files(run: str) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's tensors."""
    newest = sorted(Path(run, "checkpoints").glob("step_*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def alone(device: torch.device = torch.device("cpu")) -> World:  # noqa: B008
    """The world of one process, without connecting anything; on one thread, which is fastest for so little."""
    torch.set_num_threads(1)
    one = Group(rank=0, size=1, handle=None)
    return World(0, 1, device, everyone=one, shard=one, replicas=one, steps=HashStore())


def model(seed: int = 0) -> GPT2:
    torch.set_num_threads(1)
    made = GPT2(config().model)
    made.init_weights(seed)
    return made


def steps(run: str, shards: str, until: int | None = None, **options: Any) -> Trainer:
    """Train in this process, alone; ended after `until` steps as by a signal. Options: `mirror`, `items`, and
    settings of the machine."""
    stop = Stop()
    given = from_dict(RunConfig, read_json(f"{run}/config.json"))
    trainer_options = {key: options.pop(key) for key in ("mirror", "items") if key in options}
    given = replace(given, machine=replace(given.machine, **options))
    trainer = Trainer(given, run, shards, alone(), stop, **trainer_options)
    if until is not None:
        take = trainer.step

        def step_and_stop() -> None:
            take()
            stop.agreed = trainer.progress.step == until

        trainer.step = step_and_stop  # type: ignore[method-assign]
    assert trainer.end(trainer.loop()) == (0 if until is None else INTERRUPTED)
    return trainer
