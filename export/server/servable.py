"""One loaded version of a model: a TF1 session, as TensorFlow Serving opens it, and Predict on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from pathlib import Path

import grpc
import tensorflow as tf
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, prediction_log_pb2

from export import publish
from export.server.limits import Limits
from export.server.signature import Signature
from export.server.status import StatusError
from pipelines import manifest as manifests
from pipelines import tfrecord
from stem_util import files
from stem_util.errors import JobError, UserError

DEFAULT_SIGNATURE = "serving_default"
WARM_UP = "assets.extra/tf_serving_warmup_requests"
_MAX_WARM_UP_RECORDS = 1000
_UNLIMITED = Limits(rows=1 << 62, elements=1 << 62)  # warm-up requests come from the export and need no limits


class LoadError(Exception):
    """A version cannot serve; the message says why, in one line."""


class Servable:
    """A SavedModel with the tag ``serve`` in a session of its own.

    Args:
      path: the version directory.
      name: the model's name, echoed in answers.
      version: its number, echoed in answers.

    Raises:
      LoadError: files are missing or differ from the manifest, or a warm-up record fails.
      Exception: anything that TensorFlow raises for a damaged or foreign directory (OpError, OSError, ValueError,
        KeyError, MemoryError ...). Nothing stays open.
    """

    def __init__(self, path: Path, name: str, version: int) -> None:
        self.path, self.name, self.version = path, name, version
        if why := publish.damage(path):
            raise LoadError(why)
        config = config_pb2.ConfigProto()
        config.gpu_options.allow_growth = True  # because the next version loads beside this one
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default(), files.literal(path) as readable:
                meta = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], readable)
            axes = _axes(path)
            self._signatures = {k: Signature(self._session, x, axes.get(k)) for k, x in meta.signature_def.items()}
            self.metadata = any_pb2.Any()
            self.metadata.Pack(get_model_metadata_pb2.SignatureDefMap(signature_def=meta.signature_def))
            self.warm_up_records = self._warm_up(path / WARM_UP)
        except BaseException:
            self._session.close()
            raise

    def close(self) -> None:
        """Ends the session. No call may run or come later. :func:`free_memory` returns its memory."""
        self._session.close()

    def signature(self, key: str) -> Signature:
        """The signature of that name.

        Raises:
          StatusError: FAILED_PRECONDITION, there is none.
        """
        if key not in self._signatures:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{key}" not found.')
        return self._signatures[key]

    def prepare(self, before: Servable) -> None:
        """Builds the sets of outputs that requests use in the version that serves now, before this one takes over."""
        for key, signature in self._signatures.items():
            if key in before._signatures:
                signature.prepare(before._signatures[key])

    def _warm_up(self, path: Path) -> int:
        """Runs the recorded requests; returns their number."""
        if not path.exists():
            return 0
        records = 0
        for _, payload in tfrecord.scan(str(path)):
            records += 1
            if records > _MAX_WARM_UP_RECORDS:
                raise LoadError(f"{WARM_UP} holds more than {_MAX_WARM_UP_RECORDS} records")
            try:
                log = prediction_log_pb2.PredictionLog.FromString(payload)
                # Requests for methods that this server does not answer are skipped.
                if log.HasField("predict_log"):
                    request = log.predict_log.request
                    signature = self.signature(request.model_spec.signature_name or DEFAULT_SIGNATURE)
                    feeds = signature.read(request.inputs, request.output_filter, _UNLIMITED)
                    signature.run(feeds.arrays, feeds.wanted)
            except (DecodeError, StatusError) as error:
                raise LoadError(f"{WARM_UP}, record {records}: {one_line(error)}") from error
        return records


def one_line(error: Exception) -> str:
    """Says why a version does not load, in one line."""
    message = " ".join((error.message if isinstance(error, tf.errors.OpError) else str(error)).split())[:500]
    message = "".join(
        letter if letter.isprintable() else "\ufffd" for letter in message
    )  # of files, and of their names
    plain = LoadError | JobError | UserError | OSError | StatusError | DecodeError | tf.errors.OpError
    if isinstance(error, plain) and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def free_memory() -> None:
    """Frees the memory of closed servables, and returns it to the system.

    A graph and its operations refer to each other and to the session, which holds variables and tables. Only the
    garbage collector frees them, and by itself it would run only after many more versions. glibc keeps free pages in
    the heap of a thread until its next allocation, and a thread that has loaded a version then stays idle.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _axes(path: Path) -> dict[str, dict[str, int]]:
    """The axes that each input shares with the scores, by signature, for a model of stem-export.

    Its manifest names the signatures. In any other SavedModel, rows may depend on each other.
    """
    manifest = path / manifests.FILENAME
    tree = json.loads(manifest.read_bytes()) if manifest.exists() else {}
    if "schema" not in tree:
        return {}
    features = tree["schema"]["features"]
    rows = {feature["name"]: 1 for feature in features}
    candidates = {feature["name"]: 2 if feature["side"] == "item" else 1 for feature in features}
    axes = {"serving_default": rows, "rank": candidates, "examples": {"examples": 1}}
    return {key: axes[key] for key in tree["signatures"] if key in axes}
