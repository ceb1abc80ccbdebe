"""Sending and waiting: what differs between threads and an event loop.

Everything else of a call is written once, as coroutines over a `Transport` (`calls.py`). `Blocking` waits where an
event loop would suspend, so that coroutines over it run to their end in one step: `run`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from stem_client import protocol
from stem_client.metadata import Lock

METHODS = (protocol.PREDICT, protocol.GET_MODEL_METADATA)
CLOSED = "the client is closed"
FORKED = "the client was made before a fork, which gRPC does not survive: make one in each worker"
_Result = TypeVar("_Result")


class Attempt(Protocol):
    """A call that is under way."""

    def done(self) -> bool: ...

    def result(self) -> bytes:
        """Of one that is done; raises grpc.RpcError."""

    def cancel(self) -> Any: ...


class Transport(Protocol):
    """A channel to each of several addresses, and waiting."""

    lock: Lock

    def check(self) -> None:
        """Raises ValueError where no call can be made: closed, or of another process or event loop."""

    async def call(self, place: int, method: str, payload: bytes, timeout: float) -> bytes:
        """The answer of the address at ``place``. Raises grpc.RpcError."""

    def start(self, place: int, method: str, payload: bytes, timeout: float) -> Attempt:
        """The same, not waited for."""

    async def first(self, attempts: Sequence[Attempt], timeout: float | None) -> Attempt | None:
        """One that is done; None where there is none within ``timeout`` seconds."""

    async def sleep(self, seconds: float) -> bool:
        """Whether the client is still open afterwards; ``close`` ends the sleep."""


def run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of a coroutine over `Blocking`, which never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _Result = end.value
        return result
    finally:
        coroutine.close()
    raise AssertionError("a blocking transport does not suspend")


def connect(
    library: Any,
    targets: Sequence[str],
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Channels of ``grpc`` or ``grpc.aio``, one a target, and the methods of each by name."""
    if credentials is None:
        channels = [library.insecure_channel(target, options) for target in targets]
    else:
        channels = [library.secure_channel(target, credentials, options) for target in targets]
    return channels, [{name: channel.unary_unary(name) for name in METHODS} for channel in channels]


class ThreadLock:
    """A lock of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def acquire(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


class Blocking:
    """A transport for threads: waiting holds the calling thread."""

    def __init__(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
    ) -> None:
        self._channels, self._methods = connect(grpc, targets, credentials, options)
        self._closed = threading.Event()
        self._process = os.getpid()
        self.lock = ThreadLock()

    def close(self) -> None:
        self._closed.set()
        for channel in self._channels:
            channel.close()

    def check(self) -> None:
        if self._closed.is_set():
            raise ValueError(CLOSED)
        if os.getpid() != self._process:
            raise ValueError(FORKED)

    async def call(self, place: int, method: str, payload: bytes, timeout: float) -> bytes:
        try:
            answer: bytes = self._methods[place][method](payload, timeout=timeout)
        except ValueError as error:  # gRPC's own: closed since the check
            raise ValueError(CLOSED) from error
        return answer

    def start(self, place: int, method: str, payload: bytes, timeout: float) -> Attempt:
        try:
            attempt: Attempt = self._methods[place][method].future(payload, timeout=timeout)
        except ValueError as error:
            raise ValueError(CLOSED) from error
        return attempt

    async def first(self, attempts: Sequence[Any], timeout: float | None) -> Attempt | None:
        ended = threading.Event()
        for attempt in attempts:
            attempt.add_done_callback(lambda _: ended.set())
        ended.wait(timeout)
        return next((attempt for attempt in attempts if attempt.done()), None)

    async def sleep(self, seconds: float) -> bool:
        return not self._closed.wait(seconds)
