"""Sending and waiting, which differ between threads and an event loop.

The rest of a call is written once, as coroutines over a `Transport` (`calls.py`). `Blocking` waits where an event loop
would suspend, so a coroutine over it runs to its end in one step (`run`).
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
    """A running call."""

    def done(self) -> bool: ...

    def result(self) -> bytes:
        """The result of a finished call; raises grpc.RpcError."""

    def cancel(self) -> Any: ...


class Transport(Protocol):
    """Channels to one or several addresses, and waiting."""

    lock: Lock

    def check(self) -> None:
        """Raises ValueError if no call can be made: closed, or of another process or event loop."""

    async def call(self, place: int, method: str, payload: bytes, timeout: float) -> bytes:
        """Calls the address at ``place`` and returns its answer; raises grpc.RpcError."""

    def start(self, place: int, method: str, payload: bytes, timeout: float) -> Attempt:
        """Starts the same call without waiting."""

    async def first(self, attempts: Sequence[Attempt], timeout: float | None) -> Attempt | None:
        """Returns a finished one; None if none finishes within ``timeout`` seconds."""

    async def sleep(self, seconds: float) -> bool:
        """Sleeps; returns whether the client is still open. ``close`` ends the sleep."""


def run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Runs a coroutine over `Blocking`, which never suspends, and returns its result."""
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
    """Opens channels of ``grpc`` or ``grpc.aio``, one per target; returns them and the methods of each by name."""
    if credentials is None:
        channels = [library.insecure_channel(target, options) for target in targets]
    else:
        channels = [library.secure_channel(target, credentials, options) for target in targets]
    return channels, [{name: channel.unary_unary(name) for name in METHODS} for channel in channels]


class ThreadLock:
    """A lock for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def acquire(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


class Blocking:
    """A transport for threads: waiting blocks the calling thread."""

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
        except ValueError as error:  # raised by gRPC: closed since the check
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
