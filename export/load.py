"""Puts load on a server and says how many calls a second it answers in time.

    stem-load --target=HOST:PORT --rows=LOG --candidates=200 --clients=16
    stem-load --target=HOST:PORT --rows=LOG --candidates=50:3,200:6,1000:1 --rate=200
    stem-load --target=HOST:PORT --rows=LOG --rate=50 --steps=x1.25 --limit_p99_ms=50 --json=capacity.json

Works with whatever answers TensorFlow Serving's Predict. --clients ask again when they have been answered (closed
loop); --rate sends calls when users would, answered or not, and measures from then (open loop); --steps raises the rate
until calls are late. Requests are made of real rows, of a log or of converted data; without, the warm-up requests of
--model are sent. docs/load.md says more.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from absl import flags

from export.loading import generator, requests, steps
from export.loading.generator import Caller, Measurement
from export.loading.histogram import Histogram
from export.loading.requests import Request, Spec
from export.loading.steps import Capacity, Plan
from pipelines import cli, csv_flags, owned
from pipelines.errors import JobError, UserError
from stem_client import metadata, protocol
from stem_client.errors import RankingError
from stem_tf import report
from stem_tf.quiet import quieten_tensorflow

_TARGET = flags.DEFINE_string("target", None, "host:port of the server.", required=True)
_MODEL_NAME = flags.DEFINE_string("model_name", "ranker", "The name of the server's model.")
_VERSION = flags.DEFINE_integer("version", None, "Its version (default: the one that the server serves).")
_SIGNATURE = flags.DEFINE_enum(
    "signature",
    metadata.RANK,
    [metadata.RANK, metadata.SERVING_DEFAULT],
    "What is asked: one user's candidates, or rows.",
)
_ROWS = flags.DEFINE(
    cli.PATH,
    "rows",
    None,
    "Where requests take values from: a log (Parquet or CSV files, globs, directories) or converted data.",
)
_SCHEMA = flags.DEFINE_string(
    "schema",
    None,
    "The schema of --rows (default: that of the data or of --model; else columns are named as features).",
)
_MODEL = flags.DEFINE(
    cli.PATH, "model", None, "An exported model on this machine: without --rows its warm-up requests are sent."
)
_CANDIDATES = flags.DEFINE_string(
    "candidates", "200", "Candidates, or rows, of a request; several with how often each: 50:3,200:6,1000:1."
)
_CLIENTS = flags.DEFINE_integer("clients", 16, "Clients that wait for their answer (closed loop).", lower_bound=1)
_RATE = flags.DEFINE_float("rate", None, "Calls a second, whatever the server does (open loop).", lower_bound=0.01)
_ARRIVALS = flags.DEFINE_enum(
    "arrivals", "poisson", ["poisson", "uniform"], "When calls of --rate are due: as of independent users, or evenly."
)
_SECONDS = flags.DEFINE_float("seconds", 10, "How long to send, a step.", lower_bound=0.1, upper_bound=86_400)
_DEADLINE = flags.DEFINE_float("deadline_ms", 1000, "Of a call: later answers are worth nothing.", lower_bound=1)
_STEPS = flags.DEFINE_string(
    "steps", None, "Raise the rate until a limit breaks: by a factor from --rate, as in x1.25, or rates: 100,200,400."
)
_LIMIT = flags.DEFINE_float(
    "limit_p99_ms", 50, "The latency that 99 % of the calls of a step may take.", lower_bound=0.1
)
_CONNECTIONS = flags.DEFINE_integer("connections", 4, "Over which calls are spread.", lower_bound=1, upper_bound=1000)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", 2000, "Calls of --rate that may wait for an answer.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the rows that are drawn, and of arrivals.", lower_bound=0)
_MACHINE = flags.DEFINE_string("machine", "", "What the server runs on, for the capacity line: '2 cores of a c7i'.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "A file for the figures; one of JSON is replaced, nothing else.")
_TLS_CA = flags.DEFINE(
    cli.PATH, "tls_ca", None, "Certificates (PEM) that the server's is checked with: switches TLS on."
)
_TOKEN = flags.DEFINE(cli.PATH, "token_file", None, "A file with the bearer token of the calls.")
flags.adopt_module_key_flags(csv_flags)

_CONNECTING = 10.0
_TRYING = 60.0
_COLUMNS = ("calls", "in time", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "late p99 ms", "")


def main(argv: Sequence[str]) -> None:
    del argv
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong comes as a status
    plan, sizes = _plan(), steps.sizes(_CANDIDATES.value)
    if _JSON.value and os.path.dirname(_JSON.value) and not os.path.isdir(os.path.dirname(_JSON.value)):
        raise UserError(f"--json={_JSON.value}: there is no such directory")
    credentials, headers = _credentials(), _headers()
    spec = Spec(_MODEL_NAME.value, _VERSION.value, _SIGNATURE.value)
    served = _served(spec, credentials, headers)
    sent = _requests(spec, served, sizes)
    load = _Load(served, sent, credentials, headers)
    try:
        capacity = asyncio.run(load.run(plan))
    except grpc.aio.AioRpcError as error:
        raise JobError(f"{_TARGET.value} does not answer: {error.code().name}: {error.details()}") from None
    line = load.line(capacity) if capacity is not None else None
    if _JSON.value:
        owned.write_figures(_JSON.value, load.figures() | {"capacity_line": line})
    if load.stopped:
        raise KeyboardInterrupt
    if capacity is not None:
        if line is None:
            raise JobError(f"no capacity: {capacity.why}")
        print(f"capacity: {line}")


def _plan() -> Plan | None:
    """The rates to try; None for a single measurement."""
    if _RATE.present and _CLIENTS.present:
        raise UserError("give --clients (closed loop) or --rate (open loop), not both")
    if not _STEPS.value:
        return None
    if _CLIENTS.present:
        raise UserError("--steps raises the rate of an open loop; leave out --clients")
    if _LIMIT.value > _DEADLINE.value:
        raise UserError(f"--limit_p99_ms={_LIMIT.value:g} is more than --deadline_ms={_DEADLINE.value:g}")
    return steps.parse(_STEPS.value, _RATE.value)


def _credentials() -> grpc.ChannelCredentials | None:
    return grpc.ssl_channel_credentials(_read("tls_ca", _TLS_CA.value)) if _TLS_CA.value else None


def _headers() -> list[tuple[str, str]]:
    if not _TOKEN.value:
        return []
    lines = _read("token_file", _TOKEN.value).decode("latin-1").splitlines()
    token = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
    if not token.isascii() or not token.isprintable() or not token:
        raise UserError(f"--token_file={_TOKEN.value} holds no token of visible ASCII characters")
    return [("authorization", f"Bearer {token}")]


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be read: {error.strerror}") from None


def _served(
    spec: Spec, credentials: grpc.ChannelCredentials | None, headers: Sequence[tuple[str, str]]
) -> metadata.ModelMetadata:
    """What the server says that its model takes.

    Raises:
      JobError: it does not answer, or serves no such model.
    """
    request = protocol.GetModelMetadataRequest(metadata_field=["signature_def"])
    spec.fill(request.model_spec)
    request.model_spec.signature_name = ""
    target = _TARGET.value
    options = [("grpc.max_receive_message_length", -1)]
    channel = (
        grpc.insecure_channel(target, options)
        if credentials is None
        else grpc.secure_channel(target, credentials, options)
    )
    with channel:
        try:
            answer = channel.unary_unary(
                protocol.GET_MODEL_METADATA, response_deserializer=protocol.GetModelMetadataResponse.FromString
            )(request.SerializeToString(), timeout=_CONNECTING, metadata=headers)
            served = metadata.parse(answer)
            served.rank_features() if spec.signature == metadata.RANK else served.features()
        except grpc.RpcError as error:
            raise JobError(f"{target} does not answer: {error.code().name}: {error.details()}") from None
        except RankingError as error:
            raise JobError(f"{target}: {error}") from None
    return served


def _requests(spec: Spec, served: metadata.ModelMetadata, sizes: dict[int, float]) -> list[Request]:
    if not _ROWS.value and not _MODEL.value:
        raise UserError(
            "--rows is required (a log, or converted data), or --model for the warm-up requests of an export"
        )
    model = None
    if _MODEL.value:
        quieten_tensorflow()
        from export import published

        model = published.find(Path(_MODEL.value))
    if not _ROWS.value:
        if _CANDIDATES.present:
            raise UserError("--candidates belongs to --rows; warm-up requests have theirs")
        assert model is not None
        return requests.from_warm_up(spec, served, model)
    rows, schema = requests.find_schema(_ROWS.value, model, _SCHEMA.value)
    arrays = requests.read(rows, schema, served, csv_flags.options())
    return requests.from_rows(spec, served, arrays, sizes, np.random.default_rng(_SEED.value))


class _Load:
    """What was sent, and what came of it.

    Args:
      served: the model.
      sent: requests, in turn.
      credentials, headers: of the calls.
    """

    def __init__(
        self,
        served: metadata.ModelMetadata,
        sent: Sequence[Request],
        credentials: grpc.ChannelCredentials | None,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self._served, self._sent, self._credentials, self._headers = served, sent, credentials, headers
        self._measured: list[tuple[float | None, Measurement]] = []

    @property
    def stopped(self) -> bool:
        return any(measured.stopped for _, measured in self._measured)

    async def run(self, plan: Plan | None) -> Capacity | None:
        """One measurement, or the search for the capacity.

        Raises:
          grpc.aio.AioRpcError: the server does not answer a first call.
        """
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def stopping() -> None:
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one does not wait
                loop.remove_signal_handler(number)

        async with Caller(
            _TARGET.value,
            self._sent,
            deadline=_DEADLINE.value / 1000,
            connections=_CONNECTIONS.value,
            credentials=self._credentials,
            headers=self._headers,
        ) as caller:
            await caller.try_out(_TRYING)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stopping)
            print(self._heading(plan), flush=True)
            if plan is not None:
                return await steps.search(plan, _LIMIT.value / 1000, lambda rate: self._at(rate, caller, stop, True))
            if _RATE.value is not None:
                await self._at(_RATE.value, caller, stop, False)
            else:
                measured = await generator.closed(caller, _CLIENTS.value, _SECONDS.value, stop)
                self._measured.append((None, measured))
            self._print_all()
        return None

    async def _at(self, rate: float, caller: Caller, stop: asyncio.Event, say: bool) -> Measurement:
        random = np.random.default_rng([_SEED.value, len(self._measured)])
        due = generator.arrivals(rate, _ARRIVALS.value, random)
        measured = await generator.open_loop(caller, due, _SECONDS.value, _MAX_WAITING.value, stop)
        self._measured.append((rate, measured))
        if say:
            why = steps.broken(measured, _LIMIT.value / 1000)
            late = steps.late(measured, _LIMIT.value / 1000)
            print(
                f"{rate:8.4g} calls/s: p99 {_ms(measured.latency.quantile(0.99))} ms, "
                f"{report.percent(measured.share_good)} in time, sent {_ms(measured.late.quantile(0.99))} ms late (p99)"
                + (": generator too late" if late else f": {why}" if why else ""),
                flush=True,
            )
        return measured

    def _heading(self, plan: Plan | None) -> str:
        kinds = sorted({request.size for request in self._sent})
        what = f"{_SIGNATURE.value} with {', '.join(map(str, kinds))} {self._unit}"
        model = f"{self._served.model} version {self._served.version} at {_TARGET.value}"
        if plan is not None or _RATE.value is not None:
            how = f"open loop ({_ARRIVALS.value}): latency is from when a call was due"
        else:
            how = f"closed loop, {_CLIENTS.value} clients: latency is not corrected for coordinated omission; --rate is"
        return f"{model}, {what}\n{how}"

    @property
    def _unit(self) -> str:
        return "candidates" if _SIGNATURE.value == metadata.RANK else "rows"

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
        within = f"within {_DEADLINE.value:g} ms"
        print(
            f"goodput: {measured.good / measured.seconds:,.1f} calls/s {within} ({report.percent(measured.share_good)})"
        )
        if rate is not None and steps.late(measured, _LIMIT.value / 1000):
            print(
                f"the generator was late: it sent calls {_ms(measured.late.quantile(0.99))} ms after they were due "
                "(p99), so that these latencies are its own as much as the server's"
            )

    def line(self, capacity: Capacity) -> str | None:
        """The capacity for a runbook; None where none can be claimed."""
        if capacity.rate is None:
            return None
        words = [
            f"{'at least ' if capacity.why else ''}{capacity.rate:.4g} calls/s of "
            f"{_CANDIDATES.value if _ROWS.value else 'warm-up'} {self._unit} at p99 <= {_LIMIT.value:g} ms",
            *([_MACHINE.value] if _MACHINE.value else []),
            f"{_SIGNATURE.value} of {self._served.model} version {self._served.version}",
            *([f"generator on the same machine, {os.cpu_count()} cores"] if _is_here(_TARGET.value) else []),
            f"{datetime.date.today()}",
        ]
        return ", ".join(" ".join(word.split()) for word in words)

    def figures(self) -> dict[str, Any]:
        return {
            "target": _TARGET.value,
            "model": self._served.model,
            "version": self._served.version,
            "signature": _SIGNATURE.value,
            "sizes": sorted({request.size for request in self._sent}),
            "deadline_ms": _DEADLINE.value,
            "limit_p99_ms": _LIMIT.value,
            "measurements": [_figures(rate, measured) for rate, measured in self._measured],
        }


def _row(measured: Measurement | None, found: Histogram) -> list[str]:
    in_time = report.percent(measured.share_good) if measured is not None else ""
    quantiles = [found.quantile(share) for share in (0.5, 0.9, 0.99, 0.999)]
    return [f"{len(found):,}", in_time, *map(_ms, [*quantiles, found.longest])]


def _ms(seconds: float) -> str:
    return report.number(1000 * seconds, 1)


def _figures(rate: float | None, measured: Measurement) -> dict[str, Any]:
    return {
        "rate": rate,
        "clients": _CLIENTS.value if rate is None else None,
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


def _quantiles(found: Histogram) -> dict[str, float] | None:
    """In milliseconds; None where nothing was measured."""
    if not len(found):
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    return {name: 1000 * found.quantile(share) for name, share in shares.items()} | {"max": 1000 * found.longest}


def _is_here(target: str) -> bool:
    return target.rsplit(":", 1)[0].strip("[]") in ("localhost", "127.0.0.1", "::1")


def run() -> None:
    """Console script ``stem-load``."""
    cli.run(main)


if __name__ == "__main__":
    run()
