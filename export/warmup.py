"""Warm-up requests, which TensorFlow Serving sends to a new version before it serves it.

They are also a test: if a request fails, the new version is not served and the old one goes on.
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
"""Usual numbers of candidates, so that a server has seen such shapes before its first request."""


def write(path: Path, model: str, schema: Schema, rows: Mapping[str, np.ndarray], signatures: Sequence[str]) -> int:
    """Writes one request per signature and number of candidates; returns the number of requests.

    Args:
      path: TFRecord file of PredictionLog messages to write.
      model: the model's name.
      schema: the schema, which knows the items' features.
      rows: tensors of ``serving_default`` with at least one real row; rows are repeated as needed.
      signatures: names of the signatures.
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
    """Yields the requests of such a file; none if there is no file.

    Raises:
      CorruptRecord: a record is damaged or is no PredictionLog.
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
        dtype = tf.string if values.dtype == object else None  # an object array without elements does not tell its type
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values, dtype))
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
