"""Which GPUs has this machine, for how many ranks, and can torch use them? Asked of the driver; no torch here."""

import os
import shutil
import subprocess
import sys

DRIVER_GIB = 0.65  # of the memory that nvidia-smi lists, which no program gets


def gpu_count() -> int:
    """GPUs that this process may take; 0 without one."""
    return len(gpu_ids())


def gpu_ids() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of these GPUs: as it names them, or else by the number of the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d for d in visible.split(",") if d not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(n) for n in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def gpu_names() -> list[str]:
    return [name for name, _ in _gpus()]


def gpu_memory_gib() -> float:
    """What programs can have of this machine's smallest GPU; 0 without one."""
    return min((gib - DRIVER_GIB for _, gib in _gpus()), default=0.0)


def _gpus() -> list[tuple[str, float]]:
    """(name, GiB) of each GPU of this machine, asked of its driver."""
    if gpu_count() == 0:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True)
    rows = [line.rsplit(",", 1) for line in listed.stdout.splitlines()]
    return [(name.strip(), float(mib) / 1024) for name, mib in rows]


def ranks_here(gpus: int) -> int:
    """Ranks on this machine for a configured number of GPUs: 0 is every GPU, or one CPU rank."""
    return gpus or gpu_count() or 1


def shard_group(shard_ranks: int, ranks: int) -> int:
    """How many of the ranks share one optimizer state; `shard_ranks` 0 is all. Raises ValueError for no divisor."""
    group = shard_ranks or ranks
    if ranks % group:
        raise ValueError(f"shard_ranks={group} does not divide the {ranks} ranks: choose a divisor")
    return group


def check_gpus(gpus: int) -> None:
    """Refuse more ranks than this machine has GPUs, and GPUs that torch, which is asked in a process, can't use."""
    there = gpu_count()
    if not there:
        return
    if gpus > there:
        raise ValueError(f"gpus={gpus} is more than this machine has: choose {there} or fewer")
    asking = "from training import distributed; print(distributed.unusable_gpus())"
    done = subprocess.run([sys.executable, "-c", asking], stdout=subprocess.PIPE, text=True, check=True)
    if reason := done.stdout.strip():
        raise ValueError(reason)
