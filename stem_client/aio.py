"""The client for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
import numpy as np

from stem_client.calls import Calls
from stem_client.metadata import ModelMetadata
from stem_client.ranking import RANKING_SCORE, By, Top
from stem_client.transport import CLOSED, FORKED, Attempt, connect


class AsyncRankingClient(Calls["_Loop"]):
    """`RankingClient` for asyncio: the same arguments, methods and errors; calls are awaited.

        async with AsyncRankingClient("ranker:8500") as client:
            scores = await client.rank(user, items, timeout=0.05)

    It belongs to the event loop of its first call. Cancelling a task cancels its call at the server.
    """

    def _connect(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
    ) -> _Loop:
        return _Loop(targets, credentials, options)

    async def rank(
        self,
        user: Mapping[str, Any],
        items: Any,
        timeout: float | None = None,
        version: int | None = None,
        *,
        extra: str | None = None,
    ) -> dict[str, np.ndarray]:
        """As `RankingClient.rank`."""
        return await self._rank(user, items, timeout, version, extra)

    async def score(
        self, rows: Any, timeout: float | None = None, version: int | None = None, *, extra: str | None = None
    ) -> dict[str, np.ndarray]:
        """As `RankingClient.score`."""
        return await self._score(rows, timeout, version, extra)

    async def top(
        self,
        user: Mapping[str, Any],
        items: Any,
        by: By = RANKING_SCORE,
        k: int = 10,
        timeout: float | None = None,
        version: int | None = None,
        *,
        extra: str | None = None,
    ) -> Top:
        """As `RankingClient.top`."""
        return await self._top(user, items, by, k, timeout, version, extra)

    async def metadata(self, timeout: float | None = None, version: int | None = None) -> ModelMetadata:
        """As `RankingClient.metadata`."""
        return await self._metadata(timeout, version)

    async def close(self) -> None:
        """Ends calls in flight with CANCELLED and closes the connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncRankingClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _TaskLock:
    """A lock for tasks. A deadline or a cancellation while waiting leaves it free."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def acquire(self, timeout: float) -> bool:
        waiting = asyncio.ensure_future(self._lock.acquire())
        try:
            await asyncio.wait({waiting}, timeout=timeout)
        except asyncio.CancelledError:
            self._forsake(waiting)
            raise
        if not waiting.done():
            self._forsake(waiting)
            return False
        return True

    def _forsake(self, waiting: asyncio.Future[Any]) -> None:
        waiting.add_done_callback(lambda ended: None if ended.cancelled() else self._lock.release())
        waiting.cancel()

    def release(self) -> None:
        self._lock.release()


class _Cancelled(grpc.RpcError):
    """A call that ``close`` ended."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return "Channel closed!"


class _Loop:
    """A transport in the event loop of the first call."""

    def __init__(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
    ) -> None:
        self._settings = targets, credentials, options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: list[grpc.aio.Channel] = []
        self._methods: list[dict[str, Any]] = []
        self._process = os.getpid()
        self._closed = False
        self._ended = asyncio.Event()
        self.lock = _TaskLock()

    def check(self) -> None:
        if self._closed:
            raise ValueError(CLOSED)
        if os.getpid() != self._process:
            raise ValueError(FORKED)
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._connect(loop)
        elif self._loop is not loop:
            raise ValueError("the client belongs to the event loop of its first call: make one for each loop")

    def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._channels, self._methods = connect(grpc.aio, *self._settings)

    async def close(self) -> None:
        self._closed = True
        if self._loop is None or self._loop is not asyncio.get_running_loop():
            return  # it never connected, or the loop that could close the channels is gone
        self._ended.set()
        for channel in self._channels:
            await channel.close(None)

    async def call(self, place: int, method: str, payload: bytes, timeout: float) -> bytes:
        try:
            answer: bytes = await self._methods[place][method](payload, timeout=timeout)
        except asyncio.CancelledError:
            if self._closed and not _being_cancelled():
                raise _Cancelled from None
            raise
        except grpc.aio.UsageError as error:  # closed since the check
            raise ValueError(CLOSED) from error
        return answer

    def start(self, place: int, method: str, payload: bytes, timeout: float) -> Attempt:
        attempt = asyncio.ensure_future(self.call(place, method, payload, timeout))
        # Nobody needs the result of the slower one.
        attempt.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
        return attempt

    async def first(self, attempts: Sequence[Any], timeout: float | None) -> Attempt | None:
        done, _ = await asyncio.wait(attempts, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done), None)

    async def sleep(self, seconds: float) -> bool:
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            done, _ = await asyncio.wait({ended}, timeout=seconds)
        finally:
            ended.cancel()
        return not done


def _being_cancelled() -> bool:
    """Whether this task is being cancelled; Python 3.10 does not tell."""
    task = asyncio.current_task()
    return task is not None and hasattr(task, "cancelling") and task.cancelling() > 0
