"""Serves an exported model over gRPC, speaking TensorFlow Serving's PredictionService and ModelService.

    stem-serve --model_base_path=EXPORT_DIR --port=8500

Serves the newest version in EXPORT_DIR, takes over newer ones as they are published, and goes back when the newest is
deleted. SIGTERM or Ctrl-C lets calls in flight end. docs/serving.md says more.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from absl import flags

from export.server.directories import version_directories
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
    "host", "127.0.0.1", "Address to listen on. There is neither TLS nor a password: 0.0.0.0 lets everybody in."
)
_WAIT = flags.DEFINE_boolean("wait", False, "Start without a version and serve the first one that comes.")
_MAX_WORKERS = flags.DEFINE_integer(
    "max_workers", None, "Predict calls that run at once (default: four a core).", lower_bound=1
)
_MAX_CALLS = flags.DEFINE_integer(
    "max_calls",
    None,
    "Predict calls running and waiting; past it RESOURCE_EXHAUSTED (default: 16 a worker).",
    lower_bound=1,
)
_MAX_MESSAGE_BYTES = flags.DEFINE_integer(
    "max_message_bytes", 2**31 - 1, "Bytes of the largest request.", lower_bound=1, upper_bound=2**31 - 1
)
_POLL_SECONDS = flags.DEFINE_float("poll_seconds", 1, "Time between two looks for versions.", lower_bound=0.01)
_GRACE_SECONDS = flags.DEFINE_float("grace_seconds", 10, "Time that calls in flight have to end.", lower_bound=0)
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

    quieten_tensorflow()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong comes as an exception or a status
    from export.server.models import Models
    from export.server.servable import Servable
    from export.server.service import Server, default_workers
    from export.server.versions import Versions

    # What is imported stays: the collector, which stops every thread while it looks, need not look at it again.
    gc.collect()
    gc.freeze()

    name, host, workers = _MODEL_NAME.value, _HOST.value, _MAX_WORKERS.value or default_workers()
    versions = Versions(
        base_path,
        lambda path, version: Servable(path, name, version, as_content=_AS_CONTENT.value),
        poll_seconds=_POLL_SECONDS.value,
        report=lambda line: _say(f"{name}: {line}", sys.stderr),
        on_serving=lambda servable, before, seconds: announce(servable, before, seconds),
    )
    try:
        server = Server(
            Models({name: versions}),
            f"[{host}]:{_PORT.value}" if ":" in host else f"{host}:{_PORT.value}",
            workers=workers,
            max_calls=_MAX_CALLS.value or 16 * workers,
            max_message_bytes=_MAX_MESSAGE_BYTES.value,
        )
    except RuntimeError as error:
        raise UserError(f"cannot listen on {host}:{_PORT.value}: the port is taken or the address not ours") from error

    def announce(servable: Servable, before: int | None, seconds: float) -> None:
        server.serving()
        if before is None:
            _say(f"serving {name} version {servable.version} on {host}:{server.port}")
        else:
            _say(
                f"{name}: version {servable.version} serves in place of version {before} "
                f"(loaded in {seconds:.1f} s, {servable.warm_up_records} warm-up requests)"
            )

    versions.poll()
    if versions.serving is None and not stopping.is_set():
        if not _WAIT.value:
            raise JobError(f"no version in {base_path} loads; --wait goes on trying")
        _say(f"waiting for a version of {name} in {base_path}, on {host}:{server.port}")
    versions.start()
    stopping.wait()

    grace = _GRACE_SECONDS.value
    _say(f"{name}: stopping; calls in flight have {grace:g} s")
    drained = server.drain(grace)
    if not drained:
        _say(f"{name}: calls were still running after {grace:g} s and were cancelled", sys.stderr)
    if not (drained and versions.stop(timeout=1)):
        # A call or a load still runs in TensorFlow, which cannot be told to stop: the interpreter would wait for it.
        os._exit(0)


def _say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line at once. Whoever read our output may have gone; that is no reason to stop serving."""
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)


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
