"""The client's messages against TensorFlow Serving's own: the same bytes, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2, predict_pb2

from stem_client import features, protocol


def fill_spec(spec: Any) -> None:
    spec.name, spec.signature_name = "ranker", "rank"
    spec.version.value = 2**40


def fill_predict_request(request: Any) -> None:
    fill_spec(request.model_spec)
    for name, dtype in (("a", 9), ("b", 7), ("c", 1)):
        tensor = request.inputs[name]
        tensor.dtype = dtype
        for size in (1, 3):
            tensor.tensor_shape.dim.add(size=size)
    request.inputs["a"].int64_val.extend([1, -(2**63), 2**63 - 1])
    request.inputs["b"].string_val.extend([b"", "é".encode(), b"\xff\0"])
    request.inputs["c"].tensor_content = np.array([1, 2, 3], np.float32).tobytes()


def fill_predict_response(response: Any) -> None:
    fill_spec(response.model_spec)
    response.outputs["click"].dtype = 1
    response.outputs["click"].float_val.extend([0.25, float("inf"), -0.0])


def fill_metadata_request(request: Any) -> None:
    fill_spec(request.model_spec)
    request.metadata_field.extend(["signature_def", "more"])


def fill_metadata_response(response: Any) -> None:
    fill_spec(response.model_spec)
    response.metadata["signature_def"].type_url = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    response.metadata["signature_def"].value = b"\x01\x02"


def fill_signatures(signatures: Any) -> None:
    for name in ("rank", "serving_default"):
        definition = signatures.signature_def[name]
        definition.method_name = "tensorflow/serving/predict"
        for infos in (definition.inputs, definition.outputs):
            info = infos["x"]
            info.name, info.dtype = "x:0", 9
            info.tensor_shape.dim.add(size=-1, name="batch")
            infos["y"].tensor_shape.unknown_rank = True


def fill_label(spec: Any) -> None:
    spec.name, spec.version_label = "ranker", "canary"


@pytest.mark.parametrize(
    "theirs, ours, fill",
    [
        (model_pb2.ModelSpec, protocol.ModelSpec, fill_label),
        (model_pb2.ModelSpec, protocol.ModelSpec, fill_spec),
        (predict_pb2.PredictRequest, protocol.PredictRequest, fill_predict_request),
        (predict_pb2.PredictResponse, protocol.PredictResponse, fill_predict_response),
        (get_model_metadata_pb2.GetModelMetadataRequest, protocol.GetModelMetadataRequest, fill_metadata_request),
        (get_model_metadata_pb2.GetModelMetadataResponse, protocol.GetModelMetadataResponse, fill_metadata_response),
        (get_model_metadata_pb2.SignatureDefMap, protocol.SignatureDefMap, fill_signatures),
    ],
    ids=lambda value: getattr(getattr(value, "DESCRIPTOR", None), "name", ""),
)
def test_bytes_are_equal_both_ways(theirs: Any, ours: Any, fill: Any) -> None:
    a, b = theirs(), ours()
    fill(a)
    fill(b)
    payload = a.SerializeToString(deterministic=True)
    assert b.SerializeToString(deterministic=True) == payload and len(payload) > 10
    assert theirs.FromString(payload) == a and ours.FromString(payload) == b


def test_unknown_fields_pass_through() -> None:
    payload = predict_pb2.PredictRequest(output_filter=["click"]).SerializeToString()
    assert protocol.PredictRequest.FromString(payload).SerializeToString() == payload


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, -(2**63), 5]),
        np.arange(6, dtype=np.int64).reshape(1, 3, 2)[:, ::-1],
        np.array([[0.5, np.nan]], np.float32),
        np.array([["é".encode(), b""], [b"a", b"\0"]], object),
        np.empty((0, 2), np.float32),
    ],
)
def test_tensorflow_reads_what_is_written(array: np.ndarray) -> None:
    request = protocol.PredictRequest()
    features.write(request.inputs["x"], array)
    read = tf.make_ndarray(predict_pb2.PredictRequest.FromString(request.SerializeToString()).inputs["x"])
    assert read.dtype == array.dtype and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


def test_names_do_not_meet_tensorflows() -> None:
    for message in (protocol.PredictRequest, protocol.TensorProto, protocol.SignatureDefMap):
        assert message.DESCRIPTOR.full_name.startswith("stem_client.")
        assert message.DESCRIPTOR.file.pool is not predict_pb2.DESCRIPTOR.pool
