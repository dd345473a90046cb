"""Who does the independent pieces of a job: this process, several of them, or the tasks of a Ray cluster?

One worker is this process itself. More are spawned processes that end with it, however it ends, so that a killed
run leaves nobody behind who works on. Ray's tasks run on the cluster that RAY_ADDRESS names, else on a local one.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any, Protocol

PARENT_CHECK = 0.5  # seconds between two looks whether the parent still lives

Call = Callable[..., Any]


class Engine(Protocol):
    """Runs submitted calls and hands back their results as they come."""

    def submit(self, function: Call, *arguments: Any) -> None: ...

    def free(self) -> bool:
        """Whether one more call keeps a worker from idling: one is queued ahead for each worker."""
        ...

    def busy(self) -> bool: ...

    def next_result(self) -> Any:
        """The result of some call, once there is one. Raises what that call raised."""
        ...


@contextmanager
def engine(name: str, workers: int, lock: IO[str] | None = None) -> Iterator[Engine]:
    """`name` is "processes" or "ray"; processes hold the `lock` of an open file as long as they live."""
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if name == "ray":
        with _ray(workers) as ray:
            yield ray
    elif name != "processes":
        raise ValueError(f"no engine {name!r}: choose processes or ray")
    elif workers == 1:
        yield Here()
    else:
        with process_pool(workers, lock) as pool:
            yield Processes(pool, workers)


@contextmanager
def process_pool(workers: int, lock: IO[str] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that end with this one, however it ends; they hold the `lock` of an open file with it."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads may deadlock
    arguments = (os.getpid(), lock and Inherited(lock))
    with ProcessPoolExecutor(workers, context, _end_with_parent, arguments) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


class Here:
    """This process: a call runs when its result is asked for."""

    def __init__(self) -> None:
        self.calls: deque[tuple[Call, tuple[Any, ...]]] = deque()

    def submit(self, function: Call, *arguments: Any) -> None:
        self.calls.append((function, arguments))

    def free(self) -> bool:
        return not self.calls

    def busy(self) -> bool:
        return bool(self.calls)

    def next_result(self) -> Any:
        function, arguments = self.calls.popleft()
        return function(*arguments)


class Processes:
    def __init__(self, pool: ProcessPoolExecutor, workers: int):
        self.pool, self.workers = pool, workers
        self.futures: set[Future[Any]] = set()

    def submit(self, function: Call, *arguments: Any) -> None:
        self.futures.add(self.pool.submit(function, *arguments))

    def free(self) -> bool:
        return len(self.futures) < 2 * self.workers

    def busy(self) -> bool:
        return bool(self.futures)

    def next_result(self) -> Any:
        done = next(iter(wait(self.futures, return_when=FIRST_COMPLETED).done))
        self.futures.remove(done)
        return done.result()


class Inherited:
    """A file that spawned processes have open, too, from their first moment: its lock lasts until all have ended."""

    def __init__(self, file: IO[str]):
        self.file = file

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (reduction.DupFd(self.file.fileno()).detach(),)


def _end_with_parent(parent: int, _lock: object) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(1)


@contextmanager
def _ray(workers: int) -> Iterator[Engine]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # of the local cluster, which ends with us
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("the engine ray is not installed: pip install 'gpt2-pipeline[ray]'") from error

    root = Path(__file__).resolve().parent.parent
    if address := os.environ.get("RAY_ADDRESS"):
        modules = [str(root / "storage"), str(root / "training")]  # the cluster may have no checkout of ours
        ray.init(address, runtime_env={"py_modules": modules}, logging_level=logging.WARNING)
    else:
        ray.init("local", num_cpus=workers, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield RayTasks(ray, int(ray.cluster_resources()["CPU"]))
    finally:
        ray.shutdown()


class RayTasks:
    """Core tasks, each on one CPU; a task whose machine dies is run again by Ray."""

    def __init__(self, ray: Any, workers: int):
        self.ray, self.workers = ray, workers
        self.running: list[Any] = []

    def submit(self, function: Call, *arguments: Any) -> None:
        self.running.append(self.ray.remote(function).remote(*arguments))

    def free(self) -> bool:
        return len(self.running) < 2 * self.workers

    def busy(self) -> bool:
        return bool(self.running)

    def next_result(self) -> Any:
        done, self.running = self.ray.wait(self.running, num_returns=1)
        return self.ray.get(done[0])
