"""Serves an exported model over gRPC, speaking TensorFlow Serving's PredictionService and ModelService.

    stem-serve --model_base_path=EXPORT_DIR --port=8500

Serves the newest version in EXPORT_DIR, takes over newer ones as they are published, and goes back when the newest is
deleted. SIGTERM or Ctrl-C lets calls in flight end. docs/serving.md says more.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from absl import flags

from export.server.directories import version_directories
from export.server.limits import Limits
from export.server.options import Options
from pipelines import cli
from pipelines.errors import JobError, UserError
from stem_tf.quiet import quieten_tensorflow

_MODEL_BASE_PATH = flags.DEFINE(
    cli.PATH,
    "model_base_path",
    None,
    "Directory with the versions 1, 2, ... of the exported model.",
    required=True,
)
_MODEL_NAME = flags.DEFINE_string("model_name", "ranker", "The name that requests ask for.")
_PORT = flags.DEFINE_integer(
    "port", 8500, "Port to listen on; 0 takes a free one and prints it.", lower_bound=0, upper_bound=65535
)
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Address to listen on. 0.0.0.0 lets everybody in: give --tls_client_ca or --token_file with it.",
)
_WAIT = flags.DEFINE_boolean("wait", False, "Start without a version and serve the first one that comes.")
_THREADS = flags.DEFINE_integer(
    "threads",
    None,
    "Calls that run at once, and twice as many as batches (default: the cores, at least 2).",
    lower_bound=1,
)
_MAX_BATCH_ROWS = flags.DEFINE_integer(
    "max_batch_rows",
    2048,
    "Rows or candidates that run together. Waiting calls are joined up to it, and larger ones are cut.",
    lower_bound=1,
)
_MAX_WAIT_MS = flags.DEFINE_float(
    "max_wait_ms", 1000, "UNAVAILABLE for a Predict call that would wait longer.", lower_bound=1
)
_MAX_CALLS = flags.DEFINE_integer(
    "max_calls", 1024, "Predict calls running and waiting; RESOURCE_EXHAUSTED past it.", lower_bound=1
)
_MAX_ROWS = flags.DEFINE_integer("max_rows", Limits().rows, "Rows or candidates of a request.", lower_bound=1)
_MAX_ELEMENTS = flags.DEFINE_integer(
    "max_elements", Limits().elements, "Values in all tensors of a request, as their shapes say.", lower_bound=1
)
_MAX_MESSAGE_BYTES = flags.DEFINE_integer(
    "max_message_bytes",
    32 << 20,
    "Bytes of the largest request, also when decompressed.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
_POLL_SECONDS = flags.DEFINE_float("poll_seconds", 1, "Time between two looks for versions.", lower_bound=0.01)
_GRACE_SECONDS = flags.DEFINE_float("grace_seconds", 10, "Time that calls in flight have to end.", lower_bound=0)
_METRICS_PORT = flags.DEFINE_integer(
    "metrics_port",
    None,
    "Port of /metrics, /healthz and /readyz; 0 takes a free one.",
    lower_bound=0,
    upper_bound=65535,
)
_METRICS_SAMPLE = flags.DEFINE_float(
    "metrics_sample",
    Options.metrics_sample,
    "Share of the calls whose features and scores are counted.",
    lower_bound=0,
    upper_bound=1,
)
_REST_API_PORT = flags.DEFINE_integer(
    "rest_api_port",
    None,
    "Port of TensorFlow Serving's REST API; 0 takes a free one.",
    lower_bound=0,
    upper_bound=65535,
)
_REST_API_TIMEOUT_IN_MS = flags.DEFINE_integer(
    "rest_api_timeout_in_ms", 30_000, "Time that a call over REST may take.", lower_bound=1
)
_REST_API_MAX_BYTES = flags.DEFINE_integer(
    "rest_api_max_bytes", Options.rest_max_bytes, "Bytes of the largest body over REST.", lower_bound=1
)
_ACCESS_LOG = flags.DEFINE(cli.PATH, "access_log", None, "File that gets a JSON line for each call; - is stdout.")
_TLS_CERTIFICATE = flags.DEFINE(cli.PATH, "tls_certificate", None, "PEM file with the server's certificate, for TLS.")
_TLS_KEY = flags.DEFINE(cli.PATH, "tls_key", None, "PEM file with its key.")
_TLS_CLIENT_CA = flags.DEFINE(
    cli.PATH, "tls_client_ca", None, "PEM file; clients must present a certificate that one of these has signed."
)
_TOKEN_FILE = flags.DEFINE(
    cli.PATH, "token_file", None, "File with a token a line; calls must have the header 'authorization: Bearer TOKEN'."
)
_AS_CONTENT = flags.DEFINE_boolean(
    "enable_serialization_as_tensor_content", False, "Answer with tensor_content in place of float_val."
)


def main(argv: Sequence[str]) -> None:
    del argv
    base_path = Path(_MODEL_BASE_PATH.value)
    if not _MODEL_NAME.value:
        raise UserError("--model_name is empty")
    _check(base_path)
    stopping = threading.Event()
    _stop_on_signals(stopping)
    _many_connections()

    quieten_tensorflow()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong comes as an exception or a status
    from export.server.models import Models
    from export.server.operating import Operating
    from export.server.servable import Servable
    from export.server.service import Server
    from export.server.versions import Versions

    # What is imported stays: the collector, which stops every thread while it looks, need not look at it again.
    gc.collect()
    gc.freeze()

    name, host = _MODEL_NAME.value, _HOST.value
    address = f"[{host}]:{_PORT.value}" if ":" in host else f"{host}:{_PORT.value}"
    _reserve(host, _PORT.value)
    if _REST_API_PORT.value is not None:
        _reserve(host, _REST_API_PORT.value)
    ready = threading.Event()

    def announce(servable: Servable, before: int | None, seconds: float) -> None:
        if before is None:
            ready.set()
        else:
            _say(
                f"{name}: version {servable.version} serves in place of version {before} "
                f"(loaded in {seconds:.1f} s, {servable.warm_up_records} warm-up requests)"
            )

    def load(path: Path, version: int) -> Servable:
        with operating.loading(name):
            return Servable(path, name, version)

    versions = Versions(
        base_path,
        load,
        poll_seconds=_POLL_SECONDS.value,
        report=lambda line: _say(f"{name}: {line}", sys.stderr),
        on_serving=announce,
    )
    models = Models({name: versions})
    operating = Operating(_options(), models, lambda line: _say(f"{name}: {line}", sys.stderr))
    if operating.metrics_port:
        _say(f"metrics and health of {name} on {host}:{operating.metrics_port}")
    versions.poll()
    if not ready.is_set() and not stopping.is_set():
        if not _WAIT.value:
            raise JobError(f"no version in {base_path} loads; --wait goes on trying")
        _say(f"waiting for a version of {name} in {base_path}; {host}:{_PORT.value} is not open until it serves")
    versions.start()
    server = Server(
        models,
        threads=_THREADS.value or max(2, len(os.sched_getaffinity(0))),
        limits=Limits(_MAX_ROWS.value, _MAX_ELEMENTS.value),
        max_calls=_MAX_CALLS.value,
        max_message_bytes=_MAX_MESSAGE_BYTES.value,
        max_batch_rows=_MAX_BATCH_ROWS.value,
        max_wait_seconds=_MAX_WAIT_MS.value / 1000,
        as_content=_AS_CONTENT.value,
        observe=operating.observe if operating.observes else None,
        observe_batch=operating.observe_batch,
        credentials=operating.credentials,
        interceptors=operating.interceptors,
    )
    while not ready.wait(0.1) and not stopping.is_set():
        pass
    if ready.is_set():
        operating.listen(server)
        try:
            port = server.listen(address)
        except RuntimeError as error:
            raise _taken(host, _PORT.value) from error
        server.serving()
        operating.ready = True
        rest = f", REST on {host}:{operating.rest_port}" if operating.rest_port else ""
        _say(f"serving {name} version {versions.serving} on {host}:{port}{rest}")
    stopping.wait()

    grace = _GRACE_SECONDS.value
    _say(f"{name}: stopping; calls in flight have {grace:g} s")
    operating.ready = False
    drained = server.drain(grace)
    operating.close(1)
    if not drained:
        _say(f"{name}: calls were still running after {grace:g} s and were cancelled", sys.stderr)
    if not (drained and versions.stop(timeout=1)):
        # A call or a load still runs in TensorFlow, which cannot be told to stop: the interpreter would wait for it.
        os._exit(0)


def _options() -> Options:
    def path(flag: flags.FlagHolder[str | None]) -> Path | None:
        return None if flag.value is None else Path(flag.value)

    return Options(
        host=_HOST.value,
        metrics_port=_METRICS_PORT.value,
        metrics_sample=_METRICS_SAMPLE.value,
        rest_port=_REST_API_PORT.value,
        rest_seconds=_REST_API_TIMEOUT_IN_MS.value / 1000,
        rest_max_bytes=_REST_API_MAX_BYTES.value,
        access_log=_ACCESS_LOG.value,
        tls_certificate=path(_TLS_CERTIFICATE),
        tls_key=path(_TLS_KEY),
        tls_client_ca=path(_TLS_CLIENT_CA),
        token_file=path(_TOKEN_FILE),
    )


def _say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line at once. Whoever read our output may have gone; that is no reason to stop serving."""
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)


def _reserve(host: str, port: int) -> None:
    """A port that is taken is an error before the seconds that loading takes; the server listens when it can answer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _taken(host, port) from error


def _taken(host: str, port: int) -> UserError:
    return UserError(f"cannot listen on {host}:{port}: the port is taken or the address not ours")


def _many_connections() -> None:
    """Each connection is a descriptor, and shells allow 1,024 of them by default although the system has more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check(base_path: Path) -> None:
    """What is wrong with the directory, before the seconds that importing TensorFlow takes."""
    if (base_path / "saved_model.pb").exists():
        raise UserError(f"--model_base_path={base_path} is a version itself; give the directory above it")
    if _WAIT.value:
        return
    if not base_path.is_dir():
        raise UserError(f"--model_base_path={base_path}: no such directory; --wait waits for a first version")
    if not version_directories(base_path).versions:
        raise UserError(
            f"--model_base_path={base_path} holds no version (a directory with a number for a name, as stem-export "
            "publishes it); --wait waits for the first one"
        )


def _stop_on_signals(stopping: threading.Event) -> None:
    """The first SIGTERM or Ctrl-C asks for an orderly end; the second one does not wait."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def run() -> None:
    cli.run(main)


if __name__ == "__main__":
    run()
