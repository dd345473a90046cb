"""How does a run survive its end? Checkpoints that are complete or ignored, written while training goes on.

    checkpoints/step_000250/model.safetensors                    the weights by name, in their own dtype
                            optimizer_00000_of_00002.safetensors the optimizer state, a file a rank
                            state.json                           everything else that the next step depends on
                            DONE                                 last: readers trust nothing without it

A save copies the tensors to host memory (pinned, where there is a GPU, so that the copy runs at the bus's speed)
and leaves the writing to a thread. Each rank writes its own file into a hidden folder; the first rank waits for all
of them, renames the folder and puts DONE into it.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from storage import objects
from training.config import TRAINER_VERSION, RunConfig, defining
from training.distributed import World
from training.metrics import LOGS
from training.optim import ShardedAdamW

SCHEMA = 1
FOLDER, DONE, MODEL, STATE = "checkpoints", "DONE", "model.safetensors", "state.json"
# Fields of TrainConfig that leave the weights as they are.
WITHOUT_EFFECT = (
    "val_every",
    "val_batches",
    "val_sequences",
    "hellaswag",
    "sample_every",
    "sample_tokens",
    "health_every",
) + (
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
)
WAIT = 30.0  # seconds without a byte more, after which the ranks whose files are missing count as lost

log = logging.getLogger("gpt2.checkpoint")


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoint_folder(run: str, step: int) -> Path:
    return Path(run, FOLDER, step_name(step))


def complete(run: str) -> list[int]:
    """Steps of the complete checkpoints in a run folder (or URL), oldest first."""
    found = objects.list_files(objects.join(run, FOLDER), DONE)
    names = [stat.path.split("/")[0] for stat in found if stat.path.endswith(f"/{DONE}")]
    return sorted(int(name.removeprefix("step_")) for name in names if name.startswith("step_"))


def newest(run: str) -> Path | None:
    """The newest complete checkpoint of a local run folder; torn ones are passed over, said in the log."""
    steps = complete(run)
    for folder in sorted(Path(run, FOLDER).glob("*step_*")):
        if not (folder / DONE).exists():
            log.warning("passed over %s: it was not written to its end", folder.name)
    return checkpoint_folder(run, steps[-1]) if steps else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError for a checkpoint of another schema."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    if state["schema"] != SCHEMA:
        raise ValueError(f"{checkpoint} has schema {state['schema']}, this version reads {SCHEMA}: use the other")
    return state


def definition(config: RunConfig, device: str, shard_tokens: Sequence[int]) -> dict[str, str]:
    """What a run has to share with its checkpoint, to go on from it as if it had never stopped."""
    settings = {f"model.{key}": value for key, value in defining(config.model).items()}
    settings |= {f"train.{k}": v for k, v in defining(config.train).items() if k not in WITHOUT_EFFECT}
    settings["tokens"] = f"{shard_tokens[0]:,} in the first shard"  # later ones may be still to come
    made_by = {"trainer": TRAINER_VERSION, "torch": torch.__version__, "device": device}
    if not config.machine.gelu_epilogue:  # it changes the last bits
        made_by["gelu_epilogue"] = "false"
    return {key: str(value) for key, value in {**settings, **made_by}.items()}


def check_definition(state: dict[str, Any], now: dict[str, str], anyway: bool) -> None:
    """Raises ValueError, naming each difference, for a checkpoint of another definition, unless `anyway`."""
    then = state["definition"]
    found = [
        f"{key} was {then.get(key, 'at its default')}, now {now.get(key, 'at its default')}"
        for key in {**then, **now} if then.get(key) != now.get(key)
    ]  # fmt: skip
    if found and not anyway:
        raise ValueError(
            f"the checkpoint of step {state['step']} is another run's: {'; '.join(found)}. "
            "Put it back as it was, start a run of another name, or go on with --resume-anyway"
        )
    for difference in found:
        log.warning("resumed all the same: %s", difference)


def load_model(checkpoint: Path, model: nn.Module) -> None:
    with safe_open(checkpoint / MODEL, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))


def load_optimizer(checkpoint: Path, optimizer: ShardedAdamW) -> None:
    """Read this rank's part of the optimizer's state, whatever number of ranks wrote it."""
    files = sorted(checkpoint.glob("optimizer_*.safetensors"))
    for bucket in filter(lambda bucket: bucket.own, optimizer.buckets):
        for key in bucket.state:
            count = min(bucket.own, bucket.state[key].numel())
            part = _read_range(files, f"{bucket.stored}.{key}", bucket.offset, bucket.offset + count)
            optimizer.load_state(bucket.name, key, part)


def _read_range(files: list[Path], name: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flat tensor whose consecutive parts lie in those of `files` that have its name.

    Raises ValueError where they are not all there.
    """
    parts, at = [torch.empty(0)], 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118
                continue
            part = file.get_slice(name)
            size = part.get_shape()[0]
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                parts.append(part[low - at : high - at])
            at += size
    if at < stop:
        raise ValueError(
            f"{files[0].parent} holds {at:,} elements of {name}, where {stop:,} are wanted: it is another optimizer's, "
            "or one's with other settings, and nothing can go on from it but these"
        )
    return torch.cat(parts)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest ones, and every step that is a multiple of `every`."""

    newest: int
    every: int = 0

    def drops(self, steps: list[int]) -> list[int]:
        return [s for s in sorted(steps)[: -self.newest] if not (self.every and s % self.every == 0)]


class Checkpointer:
    """Saves a run's checkpoints; at most one is being written at a time."""

    def __init__(self, run: str, world: World, keep: Keep, mirror: str | None = None) -> None:
        self.run, self.world, self.keep, self.mirror = run, world, keep, mirror
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.here = threading.Event()  # whether the last save is whole on the local disk, or has failed
        self.here.set()
        self.copies: dict[str, Tensor] = {}  # host memory that the tensors are copied to, kept from save to save
        if world.is_first:
            for torn in Path(run, FOLDER).glob(".step_*"):
                shutil.rmtree(torn)
            self.upload()  # the last end may have come before it
        world.barrier()

    def save(self, step: int, optimizer: ShardedAdamW, state: dict[str, Any]) -> None:
        """Copy everything to host memory; return as soon as that is done, the rest follows in a thread."""
        self.wait()
        weights = self._weights(optimizer) if self.world.is_first else {}
        moments = self._moments(optimizer) if self.world.replicas.rank == 0 else {}
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.here.clear()
        # A daemon: a rank that fails ends at once, and what it was writing is a torn checkpoint.
        self.thread = threading.Thread(target=self._guarded, args=(step, weights, moments, state), daemon=True)
        self.thread.start()

    def reserve(self, optimizer: ShardedAdamW) -> None:
        """Pin the host memory for the copies before the first step: that takes longer than a copy."""
        if self.world.device.type == "cuda":
            for bucket in optimizer.buckets:
                if self.world.is_first:
                    self._buffer(f"{bucket.name}.weights", bucket.weights)
                if self.world.replicas.rank == 0:
                    for key, tensor in bucket.state.items():
                        self._buffer(f"{bucket.name}.{key}", tensor)

    def _weights(self, optimizer: ShardedAdamW) -> dict[str, Tensor]:
        """The parameters by name, as parts of one copy of each bucket."""
        found: dict[str, Tensor] = {}
        for bucket in optimizer.buckets:
            flat = self._host(f"{bucket.name}.weights", bucket.weights)
            sizes = [p.numel() for _, p in bucket.parameters]
            parts = flat[: bucket.size].split(sizes)
            found |= {n: part.view(p.shape) for (n, p), part in zip(bucket.parameters, parts, strict=True)}
        return found

    def _moments(self, optimizer: ShardedAdamW) -> dict[str, Tensor]:
        """This rank's state, without the padding, so that any number of ranks can read it."""
        return {
            f"{bucket.stored}.{key}": self._host(f"{bucket.name}.{key}", tensor)[: bucket.own]
            for bucket in optimizer.buckets
            for key, tensor in bucket.state.items()
            if bucket.own
        }

    def _host(self, name: str, tensor: Tensor) -> Tensor:
        return self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.copies:
            self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self.copies[name]

    def wait(self) -> None:
        """Until the last save is published. Raises what went wrong in it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Until the last save is published, as seen by every rank."""
        self.wait()
        self.world.barrier()

    def drop_after(self, step: int) -> None:
        """Remove every later checkpoint; no rank goes on before that is done."""
        if self.world.is_first:
            self._remove(lambda steps: [s for s in steps if s > step])
        self.world.barrier()

    def _remove(self, unwanted: Callable[[list[int]], list[int]]) -> None:
        for place in filter(None, [self.run, self.mirror]):
            remove(place, unwanted(complete(place)))

    def _guarded(self, *args: Any) -> None:
        try:
            self._write(*args)
        except (OSError, ValueError, SafetensorError) as error:  # the training thread raises it at its next save
            self.failure = error
        finally:
            self.here.set()

    def _write(self, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
        shard = self.world.shard
        hidden = Path(self.run, FOLDER, f".{step_name(step)}")
        hidden.mkdir(parents=True, exist_ok=True)
        if moments:
            _write_file(hidden / f"optimizer_{shard.rank:05d}_of_{shard.size:05d}.safetensors", moments)
        if not self.world.is_first:
            return
        _write_file(hidden / MODEL, weights)
        (hidden / STATE).write_text(json.dumps({"schema": SCHEMA, **state}, indent=1))
        _await_files(hidden, "optimizer_*.safetensors", shard.size)
        self._publish(step, hidden)

    def _publish(self, step: int, hidden: Path) -> None:
        final = hidden.with_name(step_name(step))
        if final.exists():
            (final / DONE).unlink(missing_ok=True)
            shutil.rmtree(final)
        hidden.rename(final)
        (final / DONE).touch()
        _sync(final.parent)
        log.info("saved %s", final)
        self.here.set()
        self.upload()
        self._remove(self.keep.drops)

    def upload(self) -> None:
        """Copy to the mirror what it lacks: the newest checkpoint, DONE last, and the logs as they are now."""
        if self.mirror and self.world.is_first:
            here, there = complete(self.run), complete(self.mirror)
            if here and here[-1] not in there:
                name = step_name(here[-1])
                _upload(str(checkpoint_folder(self.run, here[-1])), objects.join(self.mirror, FOLDER, name))
            for log_file in filter(lambda name: Path(self.run, name).exists(), LOGS):
                objects.publish_file(str(Path(self.run, log_file)), objects.join(self.mirror, log_file))


def remove(place: str, steps: Sequence[int]) -> None:
    """DONE goes first: a removal that is cut off leaves a torn checkpoint, never half a complete one."""
    for step in steps:
        objects.remove(objects.join(place, FOLDER, step_name(step), DONE))
        objects.remove_tree(objects.join(place, FOLDER, step_name(step)))


def drop_checkpoints(run: str, mirror: str | None) -> None:
    """Of a run that is to begin anew."""
    for place in filter(None, [run, mirror]):
        steps = complete(place)
        log.info("beginning anew: dropping the checkpoints of steps %s in %s", steps, place)
        remove(place, steps)


def _upload(folder: str, url: str) -> None:
    for found in objects.list_files(folder):
        if found.path != DONE:
            objects.publish_file(objects.join(folder, found.path), objects.join(url, found.path))
    objects.publish_bytes(objects.join(url, DONE), b"")


def fetch_newest(mirror: str, run: str) -> None:
    """Copy the mirror's newest complete checkpoint, and the logs with it, where the run folder has none so new."""
    there, here = complete(mirror), complete(run)
    if not there or (here and here[-1] >= there[-1]):
        return
    name = step_name(there[-1])
    log.info("fetching %s from %s", name, mirror)
    hidden = Path(run, FOLDER, f".{name}")
    objects.copy_tree(objects.join(mirror, FOLDER, name), str(hidden))
    (hidden / DONE).unlink()
    final = checkpoint_folder(run, there[-1])
    if final.exists():  # torn: it has no DONE
        shutil.rmtree(final)
    hidden.rename(final)
    (final / DONE).touch()
    for log_file in LOGS:
        if objects.exists(objects.join(mirror, log_file)):
            objects.publish_bytes(str(Path(run, log_file)), objects.read_bytes(objects.join(mirror, log_file)))


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    _sync(partial)
    partial.rename(path)


def _sync(path: Path) -> None:
    """Have the disk hold what was written: a checkpoint survives a power cut, too."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _await_files(folder: Path, pattern: str, count: int) -> None:
    """Until the other ranks' files are there; a folder that stops growing means that one of them is lost."""
    size, since = -1, time.monotonic()
    while len(list(folder.glob(pattern))) < count:
        now = sum(stat.bytes for stat in objects.list_files(str(folder)))
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise ValueError(f"{folder} has fewer than {count} {pattern} and stopped growing: a rank is lost")
        time.sleep(0.05)
