"""Sends requests and measures the answers: as fast as answers come (closed loop), or at given times (open loop).

In a closed loop a client sends its next call after the last answer. A server that pauses gets no calls then, so the
cost of the pause for other users is not measured ("coordinated omission"). An open loop sends calls at the times at
which users would, and measures from those times.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from export.loading.histogram import Histogram
from export.loading.requests import Request
from stem_client import protocol

NOT_SENT = "NOT_SENT"
"""A status code of this module: the call was due, but too many were waiting, or its deadline had passed."""
_PAUSE = 0.05


@dataclass
class Measurement:
    """The result of a load.

    Attributes:
      seconds: how long calls were sent.
      codes: number of calls by status code.
      good: calls that were answered OK within their deadline.
      latency: seconds of every call; a failed call counts with at least its deadline.
      by_size: the same by number of candidates or rows.
      late: seconds from when a call was due until it was sent; empty in a closed loop.
      details: the server's text for the first failure of each code.
      stopped: whether Ctrl-C ended it.
    """

    seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    good: int = 0
    latency: Histogram = field(default_factory=Histogram)
    by_size: dict[int, Histogram] = field(default_factory=dict)
    late: Histogram = field(default_factory=Histogram)
    details: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def calls(self) -> int:
        return self.codes.total()

    @property
    def share_good(self) -> float:
        return self.good / max(1, self.calls)

    def add(self, request: Request, code: str, seconds: float, deadline: float) -> None:
        good = code == "OK" and seconds <= deadline
        self.codes[code] += 1
        self.good += good
        seconds = seconds if code == "OK" else max(seconds, deadline)
        self.latency.add(seconds)
        self.by_size.setdefault(request.size, Histogram()).add(seconds)


class Caller:
    """A server under load.

    Args:
      target: host:port.
      requests: requests, which are sent in turn.
      deadline: deadline of a call, in seconds.
      connections: number of connections that share the calls.
      credentials: credentials for TLS; None for plain text.
      headers: headers of every call.
    """

    def __init__(
        self,
        target: str,
        requests: Sequence[Request],
        *,
        deadline: float,
        connections: int,
        credentials: grpc.ChannelCredentials | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        options: list[tuple[str, Any]] = [
            ("grpc.use_local_subchannel_pool", 1),  # otherwise all channels share a connection
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channels = [
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
            for _ in range(connections)
        ]
        self._methods = itertools.cycle([channel.unary_unary(protocol.PREDICT) for channel in self._channels])
        self._requests, self._headers, self.deadline = itertools.cycle(requests), headers, deadline
        self._sizes = {request.size: request for request in requests}

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def try_out(self, timeout: float) -> None:
        """Connects, and sends one call of each size on each connection.

        Raises:
          grpc.aio.AioRpcError: a call fails.
        """
        for request in self._sizes.values():
            for _ in self._channels:
                await next(self._methods)(request.data, timeout=timeout, metadata=self._headers, wait_for_ready=True)

    async def call(self, due: float, measured: Measurement) -> bool:
        """Makes the next call, measured from ``due`` on the loop's clock; returns whether it was answered OK."""
        loop, request, code = asyncio.get_running_loop(), next(self._requests), "OK"
        left = self.deadline - (loop.time() - due)
        if left <= 0:
            measured.add(request, NOT_SENT, loop.time() - due, self.deadline)
            return False
        try:
            await next(self._methods)(request.data, timeout=left, metadata=self._headers)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            measured.details.setdefault(code, error.details() or "")
        measured.add(request, code, loop.time() - due, self.deadline)
        return code == "OK"

    def skip(self, measured: Measurement) -> None:
        """Counts the next call as one that could not be sent."""
        measured.add(next(self._requests), NOT_SENT, 0.0, self.deadline)


async def closed(caller: Caller, clients: int, seconds: float, stop: asyncio.Event) -> Measurement:
    """Runs clients that each send their next call after the last answer, or 50 ms after a failure."""
    loop, measured = asyncio.get_running_loop(), Measurement()
    start = loop.time()

    async def client() -> None:
        while loop.time() < start + seconds:
            if not await caller.call(loop.time(), measured):
                await asyncio.sleep(_PAUSE)

    await _until(asyncio.gather(*(client() for _ in range(clients))), stop, measured)
    measured.seconds = loop.time() - start
    return measured


async def open_loop(
    caller: Caller, due: Iterator[float], seconds: float, most_waiting: int, stop: asyncio.Event
) -> Measurement:
    """Sends a call at each time of ``due`` (seconds from the start) before ``seconds``, whether answers came or not.

    Args:
      caller: of the server.
      due: ascending times.
      seconds: length of the load.
      most_waiting: calls that may wait for an answer; a further call counts as failed.
      stop: ends the load early when set.
    """
    loop, measured = asyncio.get_running_loop(), Measurement()
    waiting: set[asyncio.Task[bool]] = set()
    start = loop.time()

    async def one(moment: float) -> bool:
        measured.late.add(loop.time() - moment)
        return await caller.call(moment, measured)

    async def send() -> None:
        for offset in due:
            if offset >= seconds:
                break
            # Also if it is late: answers and calls are handled while this waits.
            await asyncio.sleep(max(0.0, start + offset - loop.time()))
            if len(waiting) >= most_waiting:
                caller.skip(measured)
                continue
            task = loop.create_task(one(start + offset))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.sleep(start + seconds - loop.time())

    await _until(asyncio.ensure_future(send()), stop, measured)
    measured.seconds = loop.time() - start
    if waiting:
        await asyncio.wait(set(waiting))  # each ends at its deadline
    return measured


async def _until(work: asyncio.Future[Any], stop: asyncio.Event, measured: Measurement) -> None:
    """Waits for ``work``; cancels it when ``stop`` is set."""
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    measured.stopped = stopping.done()
    for task in (work, stopping):
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if work.done() and not work.cancelled():
        work.result()


def arrivals(rate: float, kind: str, random: np.random.Generator) -> Iterator[float]:
    """Times of calls, in seconds: ``uniform``, 1 / rate apart; ``poisson``, independent of each other."""
    if kind == "uniform":
        yield from (number / rate for number in itertools.count())
    now = 0.0
    while True:
        for gap in random.exponential(1 / rate, 1024).tolist():
            now += gap
            yield now
