"""One loaded version of a model: a TF1 session, as TensorFlow Serving opens it, and Predict on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import grpc
import tensorflow as tf
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_log_pb2

from export import publish
from export.server import tensors
from export.server.signature import Signature
from export.server.status import StatusError
from pipelines import files, tfrecord
from pipelines.errors import JobError

DEFAULT_SIGNATURE = "serving_default"
WARM_UP = "assets.extra/tf_serving_warmup_requests"
_MAX_WARM_UP_RECORDS = 1000


class LoadError(Exception):
    """A version directory that does not serve; the message says why, in one line."""


class Servable:
    """A SavedModel with the tag ``serve`` in a session of its own.

    Args:
      path: the version directory.
      name: the model's name, echoed in answers.
      version: its number, echoed in answers.
      as_content: answer with ``tensor_content`` in place of the `*_val` fields.

    Raises:
      LoadError: files are missing or differ from the manifest, or a warm-up record fails.
      Exception: whatever TensorFlow raises for a damaged or foreign directory (OpError, OSError, ValueError, KeyError,
        MemoryError ...). Nothing stays open.
    """

    def __init__(self, path: Path, name: str, version: int, *, as_content: bool = False) -> None:
        self.path, self.name, self.version = path, name, version
        self._as_content = as_content
        if why := publish.damage(path):
            raise LoadError(why)
        config = config_pb2.ConfigProto()
        config.gpu_options.allow_growth = True  # the next version loads beside this one
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default(), files.literal(path) as readable:
                meta = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], readable)
            self._signatures = {key: Signature(self._session, x) for key, x in meta.signature_def.items()}
            self.metadata = any_pb2.Any()
            self.metadata.Pack(get_model_metadata_pb2.SignatureDefMap(signature_def=meta.signature_def))
            self.warm_up_records = self._warm_up(path / WARM_UP)
        except BaseException:
            self._session.close()
            raise

    def close(self) -> None:
        """Ends the session. No call may be running or come later. :func:`free_memory` gives back what it held."""
        self._session.close()

    def predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        """Answers a request whose model and version are this one's.

        Raises:
          StatusError: as TensorFlow Serving answers it.
        """
        key = request.model_spec.signature_name or DEFAULT_SIGNATURE
        signature = self._signatures.get(key)
        if signature is None:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{key}" not found.')
        outputs = signature(request.inputs, request.output_filter)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = self.name
        response.model_spec.version.value = self.version
        response.model_spec.signature_name = key
        for alias, array in outputs.items():
            tensors.encode(array, response.outputs[alias], self._as_content)
        return response

    def prepare(self, before: Servable) -> None:
        """Makes ready what requests asked of the version that serves now, before this one takes over."""
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
                # Logs of methods that this server does not answer have nothing to warm.
                if log.HasField("predict_log"):
                    self.predict(log.predict_log.request)
            except (DecodeError, StatusError) as error:
                raise LoadError(f"{WARM_UP}, record {records}: {one_line(error)}") from error
        return records


def one_line(error: Exception) -> str:
    """Why a version does not load."""
    message = " ".join((error.message if isinstance(error, tf.errors.OpError) else str(error)).split())[:500]
    if isinstance(error, LoadError | JobError | OSError | StatusError | DecodeError | tf.errors.OpError) and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def free_memory() -> None:
    """Frees what closed servables held, and gives it back to the system.

    A graph and its operations refer to each other, and to the session, whose variables and tables go with it: it takes
    the collector to free them, which comes by itself after many more versions only. glibc keeps pages that are free in
    the heap of a thread until there is another allocation; a thread that loads is idle from then on.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
