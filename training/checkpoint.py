"""How does a run survive its end? Checkpoints that are complete or ignored, written while training goes on.

    checkpoints/step_000250/model.safetensors                    the weights by name, in their own dtype
                            optimizer_00000_of_00002.safetensors the optimizer state, a file a rank
                            state.json                           everything else that the next step depends on
                            DONE                                 last, with the others' sha256: readers trust
                                                                 nothing without it

A save copies the tensors to host memory (pinned, where there is a GPU, so that the copy runs at the bus's speed)
and leaves the writing to a thread. Each rank writes its own file into a hidden folder; the first rank waits for all
of them, renames the folder and puts DONE into it.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from storage import events, objects
from storage.checkpoints import DONE, FOLDER, checkpoint_url, complete, step_name
from training.config import TRAINER_VERSION, RunConfig, defining
from training.distributed import World
from training.optim import ShardedAdamW

if TYPE_CHECKING:
    from training.mirror import Mirror

SCHEMA = 1
MODEL, STATE = "model.safetensors", "state.json"
DAMAGED = "DAMAGED"  # what DONE is called in a checkpoint whose files are not as they were written
HASHED_AT_ONCE = 8  # files of a checkpoint
# Fields of TrainConfig that leave the weights as they are.
WITHOUT_EFFECT = {
    *("val_every", "val_batches", "val_sequences", "hellaswag", "sample_every", "sample_tokens", "health_every"),
    *("checkpoint_every", "keep_checkpoints", "keep_every"),
}
WAIT = 30.0  # seconds without a byte more, after which the ranks whose files are missing count as lost

log = logging.getLogger("gpt2.checkpoint")


def checkpoint_folder(run: str, step: int) -> Path:
    return Path(checkpoint_url(run, step))


def newest(run: str) -> Path | None:
    """The newest complete checkpoint of a local run folder; torn ones are passed over, said in the log."""
    steps = complete(run)
    for folder in sorted(Path(run, FOLDER).glob("*step_*")):
        if not (folder / DONE).exists():
            log.warning("passed over %s: it was not written to its end", folder.name)
    return checkpoint_folder(run, steps[-1]) if steps else None


def pass_over_damaged(run: str) -> None:
    """Have the newest complete checkpoint be one whose files are as they were written."""
    for step in reversed(complete(run)):
        folder = checkpoint_folder(run, step)
        wrong = damage(folder)
        if not wrong:
            return
        log.error("passed over %s: %s", folder, wrong)
        (folder / DONE).rename(folder / DAMAGED)


def check_whole(run: str) -> None:
    """Raises ValueError for a run that has been saved and has no checkpoint left but damaged ones."""
    damaged = sorted(Path(run, FOLDER).glob(f"step_*/{DAMAGED}"))
    if damaged and not complete(run):
        names = ", ".join(path.parent.name for path in damaged)
        raise ValueError(
            f"the checkpoints of {run} are damaged ({names}), and there is no other to go on from: put a whole one "
            "there, or begin anew with --set resume=no (--begin-anew of the trainer)"
        )


def damage(checkpoint: Path) -> str:
    """Which files of a checkpoint are not as they were written; empty where all are. Older ones can't tell."""
    try:
        wanted = json.loads((checkpoint / DONE).read_bytes() or "{}")
    except ValueError:
        return f"{DONE} has other bytes than were written"
    missing = [name for name in wanted if not (checkpoint / name).exists()]
    if missing:
        return f"{', '.join(missing)} is missing"
    found = _digests(checkpoint, list(wanted))
    changed = [name for name in wanted if found[name] != wanted[name]]
    return f"{', '.join(changed)} has other bytes than were written" if changed else ""


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: objects.sha256(str(folder / name)), names), strict=True))


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
        for key, tensor in bucket.state.items():
            mine = tensor[: bucket.own]  # without the padding
            mine.copy_(_read_range(files, f"{bucket.stored}.{key}", bucket.offset, bucket.offset + len(mine)))


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
        return [s for s in sorted(steps)[: -self.newest] if not self.for_good(s)]

    def for_good(self, step: int) -> bool:
        return self.every > 0 and step > 0 and step % self.every == 0


class Checkpointer:
    """Saves a run's checkpoints; at most one is being written at a time."""

    def __init__(self, run: str, world: World, keep: Keep, mirror: "Mirror | None" = None) -> None:
        self.run, self.world, self.keep, self.mirror = run, world, keep, mirror
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None  # of the last save
        self.here = threading.Event()  # whether the last save is whole on the local disk, or has failed
        self.here.set()
        self.copies: dict[str, Tensor] = {}  # host memory that the tensors are copied to, kept from save to save
        if world.is_first:
            Path(run, FOLDER).mkdir(exist_ok=True)  # where that can't be, training does not begin
            self._remove_torn()
        world.barrier()

    def _remove_torn(self) -> None:
        for torn in Path(self.run, FOLDER).glob(".step_*"):
            shutil.rmtree(torn, ignore_errors=True)

    def save(self, step: int, optimizer: ShardedAdamW, state: dict[str, Any], logs: Callable[[], None]) -> None:
        """Copy everything to host memory; return as soon as that is done, the rest follows in a thread.

        `logs` has the disk hold the lines of all steps before this one: a run that goes on from here needs them.
        """
        self.wait()
        self.failure = None
        weights = self._weights(optimizer) if self.world.is_first else {}
        moments = self._moments(optimizer) if self.world.replicas.rank == 0 else {}
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.here.clear()
        # A daemon: a rank that fails ends at once, and what it was writing is a torn checkpoint.
        self.thread = threading.Thread(target=self._guarded, args=(step, weights, moments, state, logs), daemon=True)
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
        """Until the last save is published, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def settle(self) -> bool:
        """Until the last save is published, or has failed -> whether it is there. The ranks agree on it."""
        self.wait()
        return self.world.sums([float(self.failure is not None)]) == [0.0]

    def drop_after(self, step: int) -> None:
        """Remove every later checkpoint; no rank goes on before that is done. The mirror follows."""
        if self.world.is_first:
            remove(self.run, [s for s in complete(self.run) if s > step])
        self.world.barrier()

    def drop_old(self) -> None:
        """Remove what is not to be kept, but what is being copied to the mirror."""
        sending = self.mirror.sending if self.mirror else None
        remove(self.run, [s for s in self.keep.drops(complete(self.run)) if s != sending])

    def _guarded(self, step: int, *args: Any) -> None:
        try:
            self._write(step, *args)
        except (OSError, ValueError, SafetensorError) as error:
            self.failure = error
            said = f"step {step} could not be saved ({error}): training goes on, the next save tries again"
            log.error(said)
            events.warn(said)
            if self.world.is_first:
                self._remove_torn()
        finally:
            self.here.set()

    def _write(
        self,
        step: int,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        state: dict[str, Any],
        logs: Callable[[], None],
    ) -> None:
        shard = self.world.shard
        hidden = Path(self.run, FOLDER, f".{step_name(step)}")
        hidden.mkdir(parents=True, exist_ok=True)
        if moments:
            _write_file(hidden / f"optimizer_{shard.rank:05d}_of_{shard.size:05d}.safetensors", moments)
        if not self.world.is_first:
            return
        logs()
        _write_file(hidden / MODEL, weights)
        (hidden / STATE).write_text(json.dumps({"schema": SCHEMA, **state}, indent=1))
        _await_files(hidden, "optimizer_*.safetensors", shard.size)
        digests = _digests(hidden, sorted(path.name for path in hidden.iterdir()))
        log.info("saved %s", publish(hidden, json.dumps(digests, indent=1).encode()))
        self.here.set()
        if self.mirror:
            self.mirror.news.set()
        self.drop_old()


def publish(hidden: Path, done: bytes) -> Path:
    """Give a hidden folder that is whole its name, in place of what has it, and DONE."""
    final = hidden.with_name(hidden.name.removeprefix("."))
    if final.exists():
        (final / DONE).unlink(missing_ok=True)
        shutil.rmtree(final)
    hidden.rename(final)
    objects.publish_bytes(str(final / DONE), done)
    objects.sync(str(final.parent))  # so that it survives a power cut, too
    return final


def remove(place: str, steps: Sequence[int]) -> None:
    """DONE goes first: a removal that is cut off leaves a torn checkpoint, never half a complete one."""
    for step in steps:
        objects.remove(objects.join(checkpoint_url(place, step), DONE))
        objects.remove_tree(checkpoint_url(place, step))


def drop_checkpoints(run: str, mirror: str | None) -> None:
    """Of a run that is to begin anew."""
    for place in filter(None, [run, mirror]):
        steps = complete(place)
        log.info("beginning anew: dropping the checkpoints of steps %s in %s", steps, place)
        remove(place, steps)
        objects.remove_tree(objects.join(place, FOLDER))  # with those that are torn or damaged


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    objects.sync(str(partial))
    partial.rename(path)


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
