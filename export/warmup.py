"""Warm-up requests, which TensorFlow Serving plays to a new version before it serves it.

A request that fails keeps the new version from serving while the old one goes on: they are also a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from export import raw
from pipelines import tfrecord
from pipelines.schema import Schema

FILENAME = "tf_serving_warmup_requests"
IN_A_VERSION = f"assets.extra/{FILENAME}"
CANDIDATES = (1, 50, 200)
"""Usual numbers of candidates: the shapes that a server has seen before its first request."""


def write(path: Path, model: str, schema: Schema, rows: Mapping[str, np.ndarray], signatures: Sequence[str]) -> int:
    """Writes one request per signature and number of candidates; returns how many.

    Args:
      path: of the TFRecord file of PredictionLog.
      model: its name.
      schema: says which features are the items'.
      rows: tensors of ``serving_default`` of at least one real row; repeated as needed.
      signatures: names.
    """
    items = {feature.name for feature in schema.features if feature.side == "item"}
    size = len(next(iter(rows.values())))
    written = 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature in signatures:
            for candidates in CANDIDATES:
                chosen = {name: values[np.arange(candidates) % size] for name, values in rows.items()}
                if signature == "examples":
                    inputs = {"examples": raw.examples(chosen)}
                elif signature == "rank":
                    inputs = {n: values[np.newaxis] if n in items else values[:1] for n, values in chosen.items()}
                else:
                    inputs = chosen
                writer.write(_log(model, signature, inputs).SerializeToString())
                written += 1
    return written


def read(path: Path) -> Iterator[predict_pb2.PredictRequest]:
    """The requests of such a file; none where there is no file.

    Raises:
      CorruptRecord: a record is not whole, or is no PredictionLog.
    """
    if not path.exists():
        return
    for offset, payload in tfrecord.scan(str(path)):
        try:
            log = prediction_log_pb2.PredictionLog.FromString(payload)
        except DecodeError:
            raise tfrecord.CorruptRecord(str(path), offset, "it is no PredictionLog") from None
        if log.HasField("predict_log"):
            yield log.predict_log.request


def _log(model: str, signature: str, inputs: Mapping[str, np.ndarray]) -> prediction_log_pb2.PredictionLog:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, values in inputs.items():
        dtype = tf.string if values.dtype == object else None  # which an array without elements does not tell
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values, dtype))
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
