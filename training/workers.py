"""Who does the independent pieces of a job: this process, or several of them?

One worker is this process itself. More are spawned processes that end with it, however it ends, so that a
killed run leaves nobody behind who works on.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

PARENT_CHECK = 0.5  # seconds between two looks whether the parent still lives


class Engine:
    """Runs submitted calls on `workers` workers and hands back their results as they come."""

    def __init__(self, workers: int):
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.workers = workers
        self.calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.futures: set[Future[Any]] = set()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Engine":
        return self

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self.workers == 1:
            self.calls.append((function, arguments))
        else:
            self.futures.add(self._started_pool().submit(function, *arguments))

    def _started_pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # forking a process with threads may deadlock
            self.pool = ProcessPoolExecutor(self.workers, context, _end_with_parent, (os.getpid(),))
        return self.pool

    def free(self) -> bool:
        """Whether one more call keeps a worker from idling: one is queued ahead for each worker."""
        return len(self.calls) < 1 if self.workers == 1 else len(self.futures) < 2 * self.workers

    def busy(self) -> bool:
        return bool(self.calls or self.futures)

    def next_result(self) -> Any:
        """The result of some call, once there is one. Raises what that call raised."""
        if self.calls:
            function, arguments = self.calls.popleft()
            return function(*arguments)
        done = next(iter(wait(self.futures, return_when=FIRST_COMPLETED).done))
        self.futures.remove(done)
        return done.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(1)
