"""Puts load on a server and reports how many calls per second it answers in time.

    stem-load --target=HOST:PORT --rows=LOG --candidates=200 --clients=16
    stem-load --target=HOST:PORT --rows=LOG --candidates=50:3,200:6,1000:1 --rate=200
    stem-load --target=HOST:PORT --rows=LOG --rate=50 --steps=x1.25 --limit_p99_ms=50 --json=capacity.json

The server may be any that answers TensorFlow Serving's Predict. With --clients, each client sends its next call when
the last one is answered (closed loop). With --rate, calls are sent at their times, answered or not, and latency is
measured from those times (open loop). --steps raises the rate until calls are late. Requests are made of real rows from
a log or from converted data; without --rows, the warm-up requests of --model are sent. See docs/load.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.jobs import csv_flags
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned
from stem_util.errors import JobError, UserError

if TYPE_CHECKING:
    import grpc

    from export.loading.requests import Request, Spec
    from stem_client.metadata import ModelMetadata

flags = cli.Flags()

_TARGET = flags.DEFINE_string("target", None, "host:port of the server.", required=True)
_MODEL_NAME = flags.DEFINE_string("model_name", "ranker", "The name of the server's model.")
_VERSION = flags.DEFINE_integer("version", None, "The model's version (default: the one that the server serves).")
_SIGNATURE = flags.DEFINE_enum(
    "signature",
    "rank",
    ["rank", "serving_default"],
    "What to ask for: rank scores one user's candidates, serving_default rows.",
)
_ROWS = flags.DEFINE(
    cli.PLACE,
    "rows",
    None,
    "Where requests take values from: a log (Parquet or CSV files, globs, directories) or converted data.",
)
_SCHEMA = flags.DEFINE_string(
    "schema",
    None,
    "The schema of --rows (default: that of the converted data or of --model; else columns have the features' names).",
)
_MODEL = flags.DEFINE(cli.PLACE, "model", None, "An exported model: without --rows its warm-up requests are sent.")
_CANDIDATES = flags.DEFINE_string(
    "candidates", "200", "Candidates (or rows) per request; several numbers with their weights: 50:3,200:6,1000:1."
)
_CLIENTS = flags.DEFINE_integer("clients", 16, "Clients that wait for each answer (closed loop).", lower_bound=1)
_RATE = flags.DEFINE_float("rate", None, "Calls per second, whatever the server does (open loop).", lower_bound=0.01)
_ARRIVALS = flags.DEFINE_enum(
    "arrivals",
    "poisson",
    ["poisson", "uniform"],
    "When calls of --rate are due: at random, as independent users send them, or at equal intervals.",
)
_SECONDS = flags.DEFINE_float("seconds", 10, "How long each step sends.", lower_bound=0.1, upper_bound=86_400)
_DEADLINE = flags.DEFINE_float("deadline_ms", 1000, "Deadline of a call: later answers count as failed.", lower_bound=1)
_STEPS = flags.DEFINE_string(
    "steps",
    None,
    "Raise the rate until a limit is broken: from --rate by a factor (x1.25), or through given rates (100,200,400).",
)
_LIMIT = flags.DEFINE_float(
    "limit_p99_ms", 50, "The latency that 99 % of the calls of a step must keep.", lower_bound=0.1
)
_CONNECTIONS = flags.DEFINE_integer(
    "connections", 4, "Connections over which calls are spread.", lower_bound=1, upper_bound=1000
)
_MAX_WAITING = flags.DEFINE_integer(
    "max_waiting", 2000, "How many calls of --rate may wait for an answer.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the drawn rows and of the arrivals.", lower_bound=0)
_MACHINE = flags.DEFINE_string(
    "machine", "", "What the server runs on, for the capacity line, as in '2 cores of a c7i'."
)
_JSON = flags.DEFINE(
    cli.PATH, "json", None, "A file for the figures. An existing JSON file is replaced, any other file is not."
)
_TLS_CA = flags.DEFINE(
    cli.PATH, "tls_ca", None, "Certificates (PEM) to check the server's certificate with; switches TLS on."
)
_TLS_CERTIFICATE = flags.DEFINE(
    cli.PATH, "tls_certificate", None, "The client's own certificate (PEM), if the server asks for one."
)
_TLS_KEY = flags.DEFINE(cli.PATH, "tls_key", None, "The key of --tls_certificate (PEM).")
_TOKEN = flags.DEFINE(cli.PATH, "token_file", None, "A file with the bearer token that calls send.")
_CSV = csv_flags.CsvFlags(flags)


def main(argv: Sequence[str]) -> None:
    del argv
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported; errors come as a status
    _check()
    from export.loading import session, steps
    from export.loading.requests import Spec

    sizes = steps.sizes(_CANDIDATES.value)
    plan = steps.parse(_STEPS.value, _RATE.value) if _STEPS.value is not None else None
    settings = session.Settings(
        target=_TARGET.value,
        spec=Spec(_MODEL_NAME.value, _VERSION.value, _SIGNATURE.value),
        sizes=_CANDIDATES.value if _ROWS.value else "warm-up",
        clients=_CLIENTS.value,
        rate=_RATE.value,
        arrivals=_ARRIVALS.value,
        seconds=_SECONDS.value,
        deadline=_DEADLINE.value / 1000,
        limit=_LIMIT.value / 1000,
        connections=_CONNECTIONS.value,
        max_waiting=_MAX_WAITING.value,
        seed=_SEED.value,
        machine=_MACHINE.value,
        credentials=_credentials(),
        headers=_headers(),
    )
    served = session.ask(settings)
    load = session.Session(settings, served, _requests(settings.spec, served, sizes))
    capacity = load.run(plan)
    line = load.line(capacity) if capacity is not None else None
    if _JSON.value:
        owned.write_figures(_JSON.value, load.figures() | {"capacity_line": line})
    if load.stopped:
        raise KeyboardInterrupt
    if capacity is not None:
        if line is None:
            raise JobError(f"no capacity: {capacity.why}")
        print(f"capacity: {line}")


def _check() -> None:
    """Refuses flags that do not go together, before anything is sent or read."""
    if _RATE.present and _CLIENTS.present:
        raise UserError("give --clients (closed loop) or --rate (open loop), not both")
    if _STEPS.value is not None and _CLIENTS.present:
        raise UserError("--steps raises the rate of an open loop; leave out --clients")
    if _STEPS.value is not None and _LIMIT.value > _DEADLINE.value:
        raise UserError(f"--limit_p99_ms={_LIMIT.value:g} is more than --deadline_ms={_DEADLINE.value:g}")
    if bool(_TLS_CERTIFICATE.value) != bool(_TLS_KEY.value) or (_TLS_KEY.value and not _TLS_CA.value):
        raise UserError("--tls_certificate and --tls_key belong together, and to --tls_ca")
    if not _ROWS.value and not _MODEL.value:
        raise UserError("--rows is required (a log or converted data), or --model for an export's warm-up requests")
    if not _ROWS.value and _CANDIDATES.present:
        raise UserError("--candidates belongs to --rows; warm-up requests have theirs")
    if _JSON.value and not os.path.isdir(os.path.dirname(_JSON.value) or "."):
        raise UserError(f"--json={_JSON.value}: there is no such directory")


def _credentials() -> grpc.ChannelCredentials | None:
    if not _TLS_CA.value:
        return None
    import grpc

    key, certificate = (_read(flag.name, flag.value) if flag.value else None for flag in (_TLS_KEY, _TLS_CERTIFICATE))
    return grpc.ssl_channel_credentials(_read("tls_ca", _TLS_CA.value), key, certificate)


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


def _requests(spec: Spec, served: ModelMetadata, sizes: dict[int, float]) -> list[Request]:
    import numpy as np

    from export.loading import requests

    model = None
    if _MODEL.value:
        quieten_tensorflow()
        from export import published, stored

        model = published.find(stored.fetched(_MODEL.value))
    if not _ROWS.value:
        assert model is not None
        return requests.from_warm_up(spec, served, model)
    rows, schema = requests.find_schema(_ROWS.value, model, _SCHEMA.value)
    arrays = requests.read(rows, schema, served, _CSV.options())
    return requests.from_rows(spec, served, arrays, sizes, np.random.default_rng(_SEED.value))


def run() -> None:
    """Console script ``stem-load``."""
    cli.run(main, flags)


if __name__ == "__main__":
    run()
