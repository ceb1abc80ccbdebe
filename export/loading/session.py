"""One run of `stem-load`: asks the server for its inputs, puts load on it, and prints the result."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from export.loading import generator, steps
from export.loading.generator import Caller, Measurement
from export.loading.histogram import Histogram
from export.loading.requests import Request, Spec
from export.loading.steps import Capacity, Plan
from stem_client import metadata, protocol
from stem_client.errors import RankingError
from stem_tf import report
from stem_util.errors import JobError

_CONNECTING = 10.0
_TRYING = 60.0
_COLUMNS = ("calls", "in time", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms")


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
      target: host:port.
      spec: the model and its signature.
      sizes: candidates or rows per request, as text.
      clients: number of clients in a closed loop.
      rate: calls per second in an open loop; None for a closed loop.
      arrivals: `poisson` or `uniform`.
      seconds: length of a measurement.
      deadline, limit: deadline of a call and limit of p99, in seconds.
      connections, max_waiting, seed: see the flags.
      machine: a text about the server's machine.
      credentials: credentials for TLS; None for plain text.
      headers: headers of every call.
    """

    target: str
    spec: Spec
    sizes: str
    clients: int
    rate: float | None
    arrivals: str
    seconds: float
    deadline: float
    limit: float
    connections: int
    max_waiting: int
    seed: int
    machine: str
    credentials: grpc.ChannelCredentials | None
    headers: Sequence[tuple[str, str]]


def ask(settings: Settings) -> metadata.ModelMetadata:
    """Asks the server for the inputs of its model.

    Raises:
      JobError: it does not answer, or serves no such model.
    """
    request = protocol.GetModelMetadataRequest(metadata_field=["signature_def"])
    settings.spec.fill(request.model_spec)
    request.model_spec.signature_name = ""
    options = [("grpc.max_receive_message_length", -1)]
    channel = (
        grpc.insecure_channel(settings.target, options)
        if settings.credentials is None
        else grpc.secure_channel(settings.target, settings.credentials, options)
    )
    with channel:
        try:
            method = channel.unary_unary(protocol.GET_MODEL_METADATA)
            answer = method(request.SerializeToString(), timeout=_CONNECTING, metadata=settings.headers)
            served = metadata.parse(answer, settings.spec.version)
            settings.spec.features(served)
        except grpc.RpcError as error:
            raise _failure(settings.target, error) from None
        except RankingError as error:
            raise JobError(f"{settings.target}: {error}") from None
    return served


def _failure(target: str, error: Any) -> JobError:
    silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return JobError(f"{target} {'does not answer' if silent else 'refuses'}: {error.code().name}: {error.details()}")


class Session:
    """A load and its results.

    Args:
      settings: of the run.
      served: the model, from `ask`.
      sent: requests, sent in turn.
    """

    def __init__(self, settings: Settings, served: metadata.ModelMetadata, sent: Sequence[Request]) -> None:
        self._settings, self._served, self._sent = settings, served, sent
        self._measured: list[tuple[float | None, Measurement]] = []

    @property
    def stopped(self) -> bool:
        return any(measured.stopped for _, measured in self._measured)

    def run(self, plan: Plan | None) -> Capacity | None:
        """Makes one measurement, or searches for the capacity, and prints the result.

        Raises:
          JobError: the server does not answer the first call.
        """
        try:
            return asyncio.run(self._run(plan))
        except grpc.aio.AioRpcError as error:
            raise _failure(self._settings.target, error) from None

    async def _run(self, plan: Plan | None) -> Capacity | None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def stopping() -> None:
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):  # a second signal does not wait
                loop.remove_signal_handler(number)

        async with Caller(
            self._settings.target,
            self._sent,
            deadline=self._settings.deadline,
            connections=self._settings.connections,
            credentials=self._settings.credentials,
            headers=self._settings.headers,
        ) as caller:
            await caller.try_out(_TRYING)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stopping)
            print(self._heading(plan), flush=True)
            if plan is not None:
                return await steps.search(plan, self._settings.limit, lambda rate: self._at(rate, caller, stop, True))
            if self._settings.rate is not None:
                await self._at(self._settings.rate, caller, stop, False)
            else:
                measured = await generator.closed(caller, self._settings.clients, self._settings.seconds, stop)
                self._measured.append((None, measured))
            self._print_all()
        return None

    async def _at(self, rate: float, caller: Caller, stop: asyncio.Event, say: bool) -> Measurement:
        random = np.random.default_rng([self._settings.seed, len(self._measured)])
        due = generator.arrivals(rate, self._settings.arrivals, random)
        measured = await generator.open_loop(caller, due, self._settings.seconds, self._settings.max_waiting, stop)
        self._measured.append((rate, measured))
        if say:
            why = steps.broken(measured, self._settings.limit)
            late = steps.late(measured, self._settings.limit)
            print(
                f"{rate:8.4g} calls/s: p99 {_ms(measured.latency.quantile(0.99))} ms, "
                f"{report.percent(measured.share_good)} in time, sent {_ms(measured.late.quantile(0.99))} ms late (p99)"
                + (f": {why}" if why else "")
                + (", and the generator was late" if why and late else ""),
                flush=True,
            )
        return measured

    def _heading(self, plan: Plan | None) -> str:
        kinds = sorted({request.size for request in self._sent})
        what = f"{self._settings.spec.signature} with {', '.join(map(str, kinds))} {self._unit}"
        model = f"{self._served.model} version {self._served.version} at {self._settings.target}"
        if plan is not None or self._settings.rate is not None:
            how = f"open loop ({self._settings.arrivals}): latency is from when a call was due"
        else:
            how = (
                f"closed loop, {self._settings.clients} clients: latency is not corrected for coordinated omission, as "
                "that of --rate is"
            )
        return f"{model}, {what}\n{how}"

    @property
    def _unit(self) -> str:
        return "candidates" if self._settings.spec.signature == metadata.RANK else "rows"

    def _print_all(self) -> None:
        ((rate, measured),) = self._measured
        rows = [["all", *_row(measured, measured.latency), f"{measured.calls / measured.seconds:,.1f} calls/s"]]
        if len(measured.by_size) > 1:
            rows += [[f"{size}", *_row(None, found), ""] for size, found in sorted(measured.by_size.items())]
        late = [] if rate is None else ["late p99 ms"]
        for row in rows:
            if rate is not None:
                row.insert(-1, _ms(measured.late.quantile(0.99)) if row[0] == "all" else "")
        print(report.table([self._unit, *_COLUMNS[:7], *late, ""], rows))
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(measured.codes.items()))
        print(f"answers: {codes}")
        for code, text in measured.details.items():
            print(f"  {code}: {' '.join(text.split())[:200]}")
        within = f"within {1000 * self._settings.deadline:g} ms"
        print(
            f"goodput: {measured.good / measured.seconds:,.1f} calls/s {within} ({report.percent(measured.share_good)})"
        )
        if rate is not None and steps.late(measured, self._settings.limit):
            print(
                f"the generator was late: it sent calls {_ms(measured.late.quantile(0.99))} ms after they were due "
                "(p99), so that these latencies are its own as much as the server's"
            )

    def line(self, capacity: Capacity) -> str | None:
        """The capacity, as a line for a runbook; None if none can be claimed."""
        if capacity.rate is None:
            return None
        words = [
            f"{'at least ' if capacity.why else ''}{capacity.rate:.4g} calls/s of "
            f"{self._settings.sizes} {self._unit} at p99 <= {1000 * self._settings.limit:g} ms",
            *([self._settings.machine] if self._settings.machine else []),
            f"{self._settings.spec.signature} of {self._served.model} version {self._served.version}",
            *([f"generator on the same machine, {os.cpu_count()} cores"] if _is_here(self._settings.target) else []),
            f"{datetime.date.today()}",
        ]
        return ", ".join(" ".join(word.split()) for word in words)

    def figures(self) -> dict[str, Any]:
        return {
            "target": self._settings.target,
            "model": self._served.model,
            "version": self._served.version,
            "signature": self._settings.spec.signature,
            "sizes": sorted({request.size for request in self._sent}),
            "deadline_ms": 1000 * self._settings.deadline,
            "limit_p99_ms": 1000 * self._settings.limit,
            "measurements": [self._figures(rate, measured) for rate, measured in self._measured],
        }

    def _figures(self, rate: float | None, measured: Measurement) -> dict[str, Any]:
        return {
            "rate": rate,
            "clients": self._settings.clients if rate is None else None,
            "seconds": measured.seconds,
            "calls": measured.calls,
            "codes": dict(measured.codes),
            "good": measured.good,
            "goodput": measured.good / measured.seconds,
            "corrected_for_coordinated_omission": rate is not None,
            "latency_ms": _quantiles(measured.latency),
            "latency_ms_by_size": {str(size): _quantiles(found) for size, found in sorted(measured.by_size.items())},
            "late_ms": _quantiles(measured.late) if rate is not None else None,
        }


def _row(measured: Measurement | None, found: Histogram) -> list[str]:
    in_time = report.percent(measured.share_good) if measured is not None else ""
    quantiles = [found.quantile(share) for share in (0.5, 0.9, 0.99, 0.999)]
    return [f"{len(found):,}", in_time, *map(_ms, [*quantiles, found.longest])]


def _ms(seconds: float) -> str:
    return report.number(1000 * seconds, 1)


def _quantiles(found: Histogram) -> dict[str, float] | None:
    """Quantiles in milliseconds; None if nothing was measured."""
    if not len(found):
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    return {name: 1000 * found.quantile(share) for name, share in shares.items()} | {"max": 1000 * found.longest}


def _is_here(target: str) -> bool:
    return target.rsplit(":", 1)[0].strip("[]") in ("localhost", "127.0.0.1", "::1")
