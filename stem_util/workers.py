"""Worker processes for jobs whose work comes in independent tasks."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import pyarrow as pa

from stem_util.errors import JobError

Result = TypeVar("Result")

_TASKS_AHEAD = 4  # per process: enough that none waits for the slowest task before it


def _prepare_worker() -> None:
    pa.set_cpu_count(1)  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Worker(SpawnProcess):
    """A process that starts with SIGINT blocked: Ctrl-C reaches the whole group, and the parent ends its workers."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, from the first instruction on
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """Remembers the processes that it starts, so that the pool can kill them."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        self.workers.append(_Worker(*args, **kwargs))
        return self.workers[-1]


class Workers(Protocol):
    """Those who do tasks: a `Pool`, or others with the same method."""

    def run(self, function: Callable[..., Result], tasks: Sequence[tuple[str, tuple]]) -> Iterator[Result]:
        """Yields ``function(*arguments)`` for every (name, arguments), in the order of the tasks."""


class Pool:
    """Runs tasks in ``processes`` spawned processes, or in this one when that is 1."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._context = _Context()
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        if processes > 1:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                processes, self._context, initializer=_prepare_worker
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if error is not None:
            for worker in self._context.workers:
                if worker.pid is not None:
                    worker.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., Result], tasks: Sequence[tuple[str, tuple]]) -> Iterator[Result]:
        """Yields ``function(*arguments)`` for every (name, arguments), in the order of the tasks.

        Raises:
          JobError: a worker process died; the message names what was being worked on.
        """
        if self._executor is None:
            for _, arguments in tasks:
                yield function(*arguments)
            return
        waiting: collections.deque[tuple[str, concurrent.futures.Future[Result]]] = collections.deque()
        ahead = self._processes * _TASKS_AHEAD
        try:
            for name, arguments in tasks:
                waiting.append((name, self._executor.submit(function, *arguments)))
                if len(waiting) > ahead:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool:
            names = ", ".join(name for name, _ in list(waiting)[: self._processes])
            raise JobError(
                f"a worker process died while it worked on {names or 'its last task'}: killed from outside, or out of "
                "memory (fewer --processes need less)"
            ) from None
