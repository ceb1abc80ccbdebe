"""Serves an exported model over gRPC, with TensorFlow Serving's PredictionService and ModelService.

    stem-serve --model_base_path=EXPORT_DIR --port=8500

Serves the newest version in EXPORT_DIR (a directory, or a URI such as s3://bucket/models), switches to newer ones as
they are published, and goes back when the newest is deleted. --model_config_file is for several models, versions and
labels. On SIGTERM or Ctrl-C it lets calls in flight end. See docs/serving.md.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from export.server.configuration import ConfigError, Model
from export.server.directories import versions_at
from export.server.limits import Limits
from export.server.options import Options
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, stores
from stem_util.errors import JobError, UserError

if TYPE_CHECKING:
    from absl.flags import FlagHolder

    from export.server.config_file import ConfigFile

flags = cli.Flags()

_STORE_POLL_SECONDS = 30.0
"""Stores charge for each listing."""

_MODEL_BASE_PATH = flags.DEFINE(
    cli.PLACE, "model_base_path", None, "Directory or URI with the versions 1, 2, ... of the exported model."
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "The name that requests ask for (default: the one it was exported under)."
)
_MODEL_CONFIG_FILE = flags.DEFINE(
    cli.PATH,
    "model_config_file",
    None,
    "Instead of --model_base_path and --model_name: a ModelServerConfig of TensorFlow Serving in text format, for "
    "several models or versions.",
)
_CONFIG_POLL_SECONDS = flags.DEFINE_integer(
    "model_config_file_poll_wait_seconds",
    0,
    "Seconds between two readings of --model_config_file; 0: it is read once.",
    lower_bound=0,
)
_PORT = flags.DEFINE_integer(
    "port", 8500, "Port to listen on; 0 takes a free one and prints it.", lower_bound=0, upper_bound=65535
)
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Address to listen on. 0.0.0.0 lets everybody in: use --tls_client_ca or --token_file with it.",
)
_WAIT = flags.DEFINE_boolean("wait", False, "Start without a version and serve the first one that comes.")
_THREADS = flags.DEFINE_integer(
    "threads",
    None,
    "Calls that run at once; half as many batches do (default: the number of cores, at least 2).",
    lower_bound=1,
)
_MAX_BATCH_ROWS = flags.DEFINE_integer(
    "max_batch_rows",
    2048,
    "Rows or candidates that run together. Waiting calls are joined up to this number, larger ones are cut.",
    lower_bound=1,
)
_MAX_WAIT_MS = flags.DEFINE_float(
    "max_wait_ms", 1000, "A Predict call that would wait longer is answered with UNAVAILABLE.", lower_bound=1
)
_MAX_CALLS = flags.DEFINE_integer(
    "max_calls", 1024, "Predict calls that run or wait; more are answered with RESOURCE_EXHAUSTED.", lower_bound=1
)
_MAX_ROWS = flags.DEFINE_integer("max_rows", Limits().rows, "Most rows or candidates of a request.", lower_bound=1)
_MAX_ELEMENTS = flags.DEFINE_integer(
    "max_elements", Limits().elements, "Most values in all tensors of a request, by their shapes.", lower_bound=1
)
_MAX_MESSAGE_BYTES = flags.DEFINE_integer(
    "max_message_bytes",
    32 << 20,
    "Size of the largest request, also after decompression.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
_POLL_SECONDS = flags.DEFINE_float(
    "poll_seconds", None, "Time between two searches for new versions (default: 1, in a store 30).", lower_bound=0.01
)
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds", 10, "How long calls in flight may take when the server stops.", lower_bound=0
)
_METRICS_PORT = flags.DEFINE_integer(
    "metrics_port",
    None,
    "Port of /metrics, /healthz and /readyz (default: none; 0 takes a free one).",
    lower_bound=0,
    upper_bound=65535,
)
_METRICS_SAMPLE = flags.DEFINE_float(
    "metrics_sample",
    Options.metrics_sample,
    "Share of the calls whose features and scores are counted for the metrics.",
    lower_bound=0,
    upper_bound=1,
)
_REST_API_PORT = flags.DEFINE_integer(
    "rest_api_port",
    None,
    "Port of TensorFlow Serving's REST API (default: none; 0 takes a free one).",
    lower_bound=0,
    upper_bound=65535,
)
_REST_API_TIMEOUT_IN_MS = flags.DEFINE_integer(
    "rest_api_timeout_in_ms", 30_000, "How long a call over REST may take.", lower_bound=1
)
_REST_API_MAX_BYTES = flags.DEFINE_integer(
    "rest_api_max_bytes", Options.rest_max_bytes, "Size of the largest body over REST.", lower_bound=1
)
_ACCESS_LOG = flags.DEFINE(cli.PATH, "access_log", None, "File to which each call adds a line of JSON; - is stdout.")
_TLS_CERTIFICATE = flags.DEFINE(cli.PATH, "tls_certificate", None, "PEM file with the server's certificate, for TLS.")
_TLS_KEY = flags.DEFINE(cli.PATH, "tls_key", None, "PEM file with the key of --tls_certificate.")
_TLS_CLIENT_CA = flags.DEFINE(
    cli.PATH,
    "tls_client_ca",
    None,
    "PEM file with certificate authorities; clients must present a certificate that one of them signed.",
)
_TOKEN_FILE = flags.DEFINE(
    cli.PATH,
    "token_file",
    None,
    "File with one token per line; calls must have the header 'authorization: Bearer TOKEN'.",
)
_AS_CONTENT = flags.DEFINE_boolean(
    "enable_serialization_as_tensor_content", False, "Answer with tensor_content instead of float_val."
)


def main(argv: Sequence[str]) -> None:
    del argv
    # gRPC reads it when it is imported. Errors come as exceptions or statuses; every handshake that fails, such as a
    # probe's, would otherwise be logged.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    config_file, listed = _models()
    for model in listed:
        _check(model)
    options = _options()
    stopping = threading.Event()
    _stop_on_signals(stopping)
    _many_connections()

    quieten_tensorflow()
    from export.server.models import Models
    from export.server.operating import Operating
    from export.server.servable import Servable
    from export.server.service import Server, reserve
    from export.server.versions import Versions

    # Imported modules stay: the garbage collector, which stops every thread while it runs, need not visit them again.
    gc.collect()
    gc.freeze()

    host = _HOST.value
    port: int | None = None
    for flag in (_PORT, _REST_API_PORT):
        try:
            # Fails before the model is loaded, which takes seconds; the port opens after that.
            reserve(host, flag.value or 0)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{flag.value}, --{flag.name}: {error.strerror}") from error

    def report(model: str, line: str) -> None:
        _say(f"{model}: {line}", sys.stderr)

    def watch(model: Model) -> Versions:
        def announce(servable: Servable, before: int | None, seconds: float) -> None:
            if port is None:
                return
            if before is None:
                _say(f"serving {servable.name} version {servable.version} on {host}:{port}")
                return
            place = "in place of" if versions.model.policy.latest == 1 else "beside"
            _say(
                f"{servable.name}: version {servable.version} serves {place} version {before} "
                f"(loaded in {seconds:.1f} s, {servable.warm_up_records} warm-up requests)"
            )

        poll_seconds = _POLL_SECONDS.value or (_STORE_POLL_SECONDS if stores.is_uri(model.base_path) else 1)
        versions = Versions(model, load, poll_seconds=poll_seconds, report=report, on_serving=announce)
        return versions

    def load(path: Path, name: str, version: int) -> Servable:
        with operating.loading(name):
            return Servable(path, name, version)

    models = Models(listed, watch, report, reloads=config_file is not None)
    operating = Operating(options, models, lambda line: _say(line, sys.stderr))
    if operating.metrics_port:
        _say(f"metrics and health on {host}:{operating.metrics_port}")
    models.start()
    if (missing := models.wait(stopping, until_ready=False)) and not stopping.is_set():
        places = ", ".join(str(model.base_path) for model in missing)
        if not _WAIT.value:
            models.stop(timeout=1)
            raise JobError(f"no version in {places} loads; --wait goes on trying")
        waiting = ", ".join(model.name or "the model" for model in missing)
        _say(f"waiting for a version of {waiting} in {places}; {host}:{_PORT.value} is not open until it serves")
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
    if config_file is not None and _CONFIG_POLL_SECONDS.value:
        config_file.follow(models.replace, _CONFIG_POLL_SECONDS.value)
    if not models.wait(stopping, until_ready=True):
        operating.listen(server)
        try:
            port = server.listen(host, _PORT.value)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot listen on {host}:{_PORT.value}, --port: it was taken meanwhile") from error
        server.serving()
        operating.ready = True
        rest = f", REST on {host}:{operating.rest_port}" if operating.rest_port else ""
        for name, serving in models.loaded().items():
            _say(f"serving {name} version {', '.join(map(str, serving))} on {host}:{port}{rest}")
    stopping.wait()

    if config_file is not None:
        config_file.stop()
    grace, names = _GRACE_SECONDS.value, ", ".join(models.loaded()) or "no model"
    _say(f"{names}: stopping; calls in flight have {grace:g} s")
    operating.ready = False
    drained = server.drain(grace)
    operating.close(1)
    if not drained:
        _say(f"{names}: calls were still running after {grace:g} s and were cancelled", sys.stderr)
    # At once: a call or a load may still run in TensorFlow, which cannot be told to stop, and connections should end
    # with the process (see Server.drain).
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)


def _models() -> tuple[ConfigFile | None, list[Model]]:
    """The models that the flags name, and the file that lists them, if there is one."""
    if _MODEL_CONFIG_FILE.value is None:
        if _MODEL_BASE_PATH.value is None:
            raise UserError("--model_base_path is required, or --model_config_file in its place")
        if _MODEL_NAME.value == "":
            raise UserError("--model_name is empty")
        if _CONFIG_POLL_SECONDS.value:
            raise UserError("--model_config_file_poll_wait_seconds is for --model_config_file")
        place = _MODEL_BASE_PATH.value
        return None, [Model(_MODEL_NAME.value, place if stores.is_uri(place) else Path(place))]
    for flag in (_MODEL_BASE_PATH, _MODEL_NAME):
        if flag.value is not None:
            raise UserError(f"--model_config_file names the models: leave out --{flag.name}")
    from export.server.config_file import ConfigFile

    config_file = ConfigFile(Path(_MODEL_CONFIG_FILE.value), lambda line: _say(line, sys.stderr))
    try:
        return config_file, config_file.models()
    except ConfigError as error:
        raise UserError(f"--model_config_file={_MODEL_CONFIG_FILE.value}: {error}") from error


def _options() -> Options:
    """Returns the options that the flags set.

    Raises:
      UserError: two ports are the same, or a flag needs another one.
    """
    ports = [flag for flag in (_PORT, _METRICS_PORT, _REST_API_PORT) if flag.value]
    for one, other in itertools.combinations(ports, 2):
        if one.value == other.value:
            raise UserError(f"--{one.name} and --{other.name} are both {one.value}: each needs a port of its own")
    for needed, flag in (
        (_METRICS_PORT, _METRICS_SAMPLE),
        (_REST_API_PORT, _REST_API_TIMEOUT_IN_MS),
        (_REST_API_PORT, _REST_API_MAX_BYTES),
    ):
        if flag.present and needed.value is None:
            raise UserError(f"--{flag.name} is for --{needed.name}")

    def path(flag: FlagHolder[str | None]) -> Path | None:
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
    """Prints a line at once. If nobody reads the output any more, the server goes on."""
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)


def _many_connections() -> None:
    """Raises the limit of open files: each connection is one, and shells allow 1,024 of them by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check(model: Model) -> None:
    """Refuses a wrong directory before TensorFlow is imported, which takes seconds."""
    path = model.base_path
    named = f"--model_base_path={path}" if _MODEL_CONFIG_FILE.value is None else f"{model.name}: base_path {path}"
    if "saved_model.pb" in stores.listing(path) if isinstance(path, str) else (path / "saved_model.pb").exists():
        raise UserError(f"{named} is a version itself; give the directory above it")
    if _WAIT.value:
        return
    if isinstance(path, Path) and not path.is_dir():
        raise UserError(f"{named}: no such directory; --wait waits for a first version")
    if not versions_at(path).listing().versions:
        raise UserError(
            f"{named} holds no version (a directory with a number for a name, as stem-export publishes it); "
            "--wait waits for the first one"
        )


def _stop_on_signals(stopping: threading.Event) -> None:
    """The first SIGTERM or Ctrl-C stops the server in good order, the second one at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def run() -> None:
    cli.run(main, flags)


if __name__ == "__main__":
    run()
