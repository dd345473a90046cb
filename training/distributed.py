"""Which ranks are there, and how do they exchange tensors?

torchrun starts the ranks; a process started without it is a world of one. NCCL connects GPUs, gloo CPUs.
Ranks form shard groups, whose members each keep a part of the optimizer's state, and replica groups, whose
members keep the same part; by default one shard group spans the world, and a replica group is a single rank.
A group of one exchanges nothing.
"""

import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from training.gpus import gpu_count, shard_group

# torch 2.13 renamed both collectives; 2.11 has only the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


WATCH = 0.8  # of the time limit: a rank that has not come further for so long says so
LOOKS = 20  # in that time, each with a sign of life
LOOK = 0.2  # seconds between two looks at whether the first rank is done
MISSED = 5  # signs of life, after which a process counts as hanging

log = logging.getLogger("gpt2.distributed")


@dataclass
class Clock:
    """When this rank last came further."""

    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Group:
    """Some ranks, in order; `rank` is this process's place among them."""

    rank: int
    size: int
    handle: dist.ProcessGroup | None

    def reduce_scatter(self, output: Tensor, whole: Tensor) -> dist.Work | None:
        """Start summing `whole` over the group, part `rank` of the sum going to `output`."""
        if self.size == 1:
            if output.data_ptr() != whole.data_ptr():
                output.copy_(whole)
            return None
        return _reduce_scatter(output, whole, group=self.handle, async_op=True)

    def all_gather(self, whole: Tensor, part: Tensor) -> dist.Work | None:
        """Start filling `whole` with every rank's `part`; `part` may lie in its place in `whole`."""
        return None if self.size == 1 else _all_gather(whole, part, group=self.handle, async_op=True)

    def all_reduce(self, tensor: Tensor) -> dist.Work | None:
        """Start summing `tensor` over the group, in place."""
        return None if self.size == 1 else dist.all_reduce(tensor, group=self.handle, async_op=True)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    everyone: Group
    shard: Group  # ranks that share one copy of the optimizer's state
    replicas: Group  # ranks that keep the same part of it
    steps: dist.Store  # where each rank says how far it is
    clock: Clock = field(default_factory=Clock)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def reached(self, step: int, backward_done: bool = False) -> None:
        """Say how far this rank is, for `where`."""
        self.clock.since = time.monotonic()
        self.steps.set(str(self.rank), f"{step} {int(backward_done)}")

    def where(self) -> str:
        """How far each rank is, and whom the others wait for: the ranks behind them, or that give no sign of life."""
        places = {rank: self._place_of(rank) for rank in range(self.size)}
        beats = {rank: self._beats_of(rank) for rank in range(self.size)}
        awaited = [
            f"rank {rank}"
            for rank, place in places.items()
            if place < max(places.values()) or beats[rank] + MISSED < max(beats.values())
        ]
        waiting = f"; the others wait for {' and '.join(awaited)}" if awaited else ""
        return "; ".join(f"rank {rank}: {_place_name(*place)}" for rank, place in places.items()) + waiting

    def _place_of(self, rank: int) -> tuple[int, int]:
        """(step, whether its backward pass is done)"""
        if not self.steps.check([str(rank)]):
            return -1, 0
        step, done = self.steps.get(str(rank)).decode().split()
        return int(step), int(done)

    def barrier(self) -> None:
        self.sums([0.0])

    @contextmanager
    def first_alone(self, what: str) -> Iterator[bool]:
        """What the first rank does while the others wait for it, however long it takes: collectives have a limit.

        Gives whether this is the first rank. Where it fails there, the others end, too.
        """
        if self.is_first:
            came_to = "failed"
            try:
                yield True
                came_to = "done"
            finally:
                self.steps.set(what, came_to)
            return
        yield False
        while not self.steps.check([what]):
            time.sleep(LOOK)
        if self.steps.get(what) != b"done":
            sys.exit(1)

    def sums(self, values: Sequence[float | Tensor]) -> list[float]:
        """The sum of each value over all ranks, in fp64; returns when every rank has come here."""
        parts = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        total = torch.stack(parts)
        finish(self.everyone.all_reduce(total))
        return total.tolist()  # type: ignore[no-any-return]

    def beat(self, count: int) -> None:
        """Say that this rank's process is alive."""
        self.steps.set(f"beat {self.rank}", str(count))

    def _beats_of(self, rank: int) -> int:
        return int(self.steps.get(f"beat {rank}")) if self.steps.check([f"beat {rank}"]) else 0


def _place_name(step: int, done: int) -> str:
    return "not started" if step < 0 else f"step {step}, {'after' if done else 'in'} its backward pass"


def watch(world: World, limit: float) -> None:
    """Have a thread say who hangs, before the time limit of the collectives ends this rank without a word.

    On a GPU the ranks wait inside of NCCL, whose own watchdog aborts the process.
    """

    def look() -> None:
        for count in itertools.count(1):
            time.sleep(WATCH * limit / LOOKS)
            world.beat(count)
            waited = time.monotonic() - world.clock.since
            if waited > WATCH * limit:
                log.error("rank %d has not come further for %.0f s. %s", world.rank, waited, world.where())
                world.clock.since = time.monotonic()

    if world.size > 1:
        threading.Thread(target=look, daemon=True).start()


def finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def join(shard_ranks: int = 0, timeout: float = 600.0) -> World:
    """Connect to the other ranks.

    `shard_ranks`: ranks a shard group; 0: all of them. `timeout`: seconds after which a collective has failed.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shard_ranks = shard_group(shard_ranks, size)
    device = _device(local_rank, local_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    store = next(rendezvous("env://", timeout=limit))[0] if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size, timeout=limit)
    first = rank - rank % shard_ranks
    shards = [range(start, start + shard_ranks) for start in range(0, size, shard_ranks)]
    replicas = [range(place, size, shard_ranks) for place in range(shard_ranks)]
    return World(
        rank=rank,
        size=size,
        device=device,
        everyone=Group(rank, size, dist.group.WORLD),
        shard=Group(rank - first, shard_ranks, _group_of(rank, shards, limit)),
        replicas=Group(rank // shard_ranks, size // shard_ranks, _group_of(rank, replicas, limit)),
        steps=dist.PrefixStore("steps", store),
    )


def leave() -> None:
    dist.destroy_process_group()


def _group_of(rank: int, groups: Sequence[range], limit: timedelta) -> dist.ProcessGroup | None:
    """Form every group (each rank has to take part in forming all) and return the one with `rank`."""
    if len(groups) == 1:
        return dist.group.WORLD
    handles = [dist.new_group(list(ranks), timeout=limit) if len(ranks) > 1 else None for ranks in groups]
    return next(handle for handle, ranks in zip(handles, groups, strict=True) if rank in ranks)


def unusable_gpus() -> str:
    """Why torch can use none of the GPUs that the driver lists; empty where it can, or where there are none."""
    count = gpu_count()
    if torch.cuda.is_available() or not count:
        return ""
    cuda = torch.version.cuda
    built = f"for CUDA {cuda}, which may be too new for the driver" if cuda else "without CUDA"
    return (
        f"torch {torch.__version__} can't use this machine's GPUs ({count} of them): it is built {built}. Install a "
        "torch for a CUDA that the driver supports (`nvidia-smi` shows which), or train on the CPU with "
        "CUDA_VISIBLE_DEVICES= before the command"
    )


def _device(local_rank: int, local_size: int) -> torch.device:
    """A GPU for each rank of this machine, or the CPU, its cores shared evenly, where there is none."""
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"{local_size} ranks on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs: "
                f"set gpus={torch.cuda.device_count()} or fewer"
            )
        # Memory that one phase of a step frees can then be joined for the next: 0.9 GiB less at 1558M.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if reason := unusable_gpus():
        raise ValueError(reason)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.device("cpu")
