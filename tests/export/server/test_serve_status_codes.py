"""TensorFlow Serving's status codes and texts, each asked for over the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

RequestFor = Callable[..., predict_pb2.PredictRequest]


def fails(call: Callable[..., Any], request: Any) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return caught.value.code(), caught.value.details()


@pytest.fixture
def good(request_for: RequestFor) -> predict_pb2.PredictRequest:
    return request_for(user=[1], item=[2])


def test_no_model_spec(served: Any) -> None:
    expected = (StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
    assert fails(served.prediction.Predict, predict_pb2.PredictRequest()) == expected
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    assert fails(served.prediction.GetModelMetadata, metadata) == expected
    assert fails(served.model.GetModelStatus, get_model_status_pb2.GetModelStatusRequest()) == expected


def test_empty_model_name(served: Any, good: predict_pb2.PredictRequest) -> None:
    good.model_spec.name = ""
    good.model_spec.signature_name = "serving_default"
    expected = (StatusCode.INVALID_ARGUMENT, "ModelSpec has no name specified.")
    assert fails(served.prediction.Predict, good) == expected
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    metadata.model_spec.SetInParent()
    assert fails(served.prediction.GetModelMetadata, metadata) == expected


def test_unknown_model(served: Any, good: predict_pb2.PredictRequest) -> None:
    good.model_spec.name = "nope"
    expected = (StatusCode.NOT_FOUND, "Servable not found for request: Latest(nope)")
    assert fails(served.prediction.Predict, good) == expected
    good.model_spec.version.value = 7
    expected = (StatusCode.NOT_FOUND, "Servable not found for request: Specific(nope, 7)")
    assert fails(served.prediction.Predict, good) == expected


def test_unknown_version(served: Any, good: predict_pb2.PredictRequest) -> None:
    good.model_spec.version.value = 99
    expected = (StatusCode.NOT_FOUND, "Servable not found for request: Specific(ranker, 99)")
    assert fails(served.prediction.Predict, good) == expected
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    metadata.model_spec.CopyFrom(good.model_spec)
    assert fails(served.prediction.GetModelMetadata, metadata) == expected


def test_unknown_label(served: Any, good: predict_pb2.PredictRequest) -> None:
    good.model_spec.version_label = "canary"
    expected = (StatusCode.INVALID_ARGUMENT, "Unrecognized servable version label: canary")
    assert fails(served.prediction.Predict, good) == expected


def test_unknown_signature(served: Any, request_for: RequestFor) -> None:
    expected = (StatusCode.FAILED_PRECONDITION, 'Serving signature key "foo" not found.')
    assert fails(served.prediction.Predict, request_for("foo", user=[1], item=[2])) == expected


def test_signature_that_is_no_method(served: Any, request_for: RequestFor) -> None:
    code, text = fails(served.prediction.Predict, request_for("__saved_model_init_op"))
    assert code == StatusCode.INTERNAL
    assert text == (
        "Expected prediction signature method_name to be one of {tensorflow/serving/predict, "
        "tensorflow/serving/classify, tensorflow/serving/regress}. Was: "
    )


def test_missing_and_extra_inputs(served: Any, request_for: RequestFor) -> None:
    assert fails(served.prediction.Predict, request_for(item=[2])) == (
        StatusCode.INVALID_ARGUMENT,
        "input size does not match signature: 1!=2 len({item}) != len({item,user}). "
        "Sent extra: {}. Missing but required: {user}.",
    )
    assert fails(served.prediction.Predict, request_for(user=[1], zebra=[1], item=[2], hour=[3])) == (
        StatusCode.INVALID_ARGUMENT,
        "input size does not match signature: 4!=2 len({hour,item,user,zebra}) != len({item,user}). "
        "Sent extra: {hour,zebra}. Missing but required: {}.",
    )
    assert fails(served.prediction.Predict, request_for()) == (
        StatusCode.INVALID_ARGUMENT,
        "input size does not match signature: 0!=2 len({}) != len({item,user}). "
        "Sent extra: {}. Missing but required: {item,user}.",
    )


def test_renamed_input(served: Any, request_for: RequestFor) -> None:
    assert fails(served.prediction.Predict, request_for(member=[1], item=[2])) == (
        StatusCode.INVALID_ARGUMENT,
        "Signature input alias: user(feed name: serving_default_user:0) not found in request and no default value "
        "provided. Inputs expected to be in the request {item,member}, or default input alias set: ",
    )


def test_unreadable_tensor(served: Any, good: predict_pb2.PredictRequest) -> None:
    good.inputs["user"].tensor_content = b"123"
    expected = (StatusCode.INVALID_ARGUMENT, "tensor parsing error: user")
    assert fails(served.prediction.Predict, good) == expected


def test_wrong_dtype(served: Any, request_for: RequestFor) -> None:
    request = request_for(user=np.array([1], np.float32), item=np.array([2], np.float32))
    expected = (StatusCode.INVALID_ARGUMENT, "Expects arg[0] to be int64 but float is provided")
    assert fails(served.prediction.Predict, request) == expected
    request = request_for(user=["a"], item=[2])
    expected = (StatusCode.INVALID_ARGUMENT, "Expects arg[1] to be int64 but string is provided")
    assert fails(served.prediction.Predict, request) == expected


def test_bad_output_filter(served: Any, request_for: RequestFor) -> None:
    request = request_for(user=[1], item=[2], outputs=("nope",))
    assert fails(served.prediction.Predict, request) == (
        StatusCode.INVALID_ARGUMENT,
        "output tensor alias not found in signature: nope Outputs expected to be in the set {click,like}.",
    )
    request = request_for(user=[1], item=[2], outputs=("click", "click"))
    expected = (StatusCode.INVALID_ARGUMENT, "duplicate output tensor alias: click")
    assert fails(served.prediction.Predict, request) == expected


def test_metadata_fields(served: Any) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest()
    request.model_spec.name = "ranker"
    expected = "GetModelMetadataRequest must specify at least one metadata_field"
    assert fails(served.prediction.GetModelMetadata, request) == (StatusCode.INVALID_ARGUMENT, expected)
    request.metadata_field.extend(["signature_def", "foo"])
    expected = "Metadata field foo is not supported"
    assert fails(served.prediction.GetModelMetadata, request) == (StatusCode.INVALID_ARGUMENT, expected)


def test_status_of_what_is_not_there(served: Any) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "ranker"
    request.model_spec.version.value = 9
    expected = (StatusCode.NOT_FOUND, "Could not find version 9 of model ranker")
    assert fails(served.model.GetModelStatus, request) == expected
    request.model_spec.name = "x"
    expected = (StatusCode.NOT_FOUND, "Could not find version 9 of model x")
    assert fails(served.model.GetModelStatus, request) == expected
    request.model_spec.ClearField("version")
    expected = (StatusCode.NOT_FOUND, "Could not find any versions of model x")
    assert fails(served.model.GetModelStatus, request) == expected


def test_reload(served: Any) -> None:
    request = model_management_pb2.ReloadConfigRequest()
    assert fails(served.model.HandleReloadConfigRequest, request) == (
        StatusCode.INVALID_ARGUMENT,
        "ServerModelConfig type not supported by HandleReloadConfigRequest. "
        "Only ModelConfigList is currently supported",
    )
    request.config.model_config_list.config.add(name="other", base_path="models/other")
    assert fails(served.model.HandleReloadConfigRequest, request) == (
        StatusCode.INVALID_ARGUMENT,
        "Expected model other to have an absolute path or URI; got base_path()=models/other",
    )


@pytest.mark.parametrize(
    ("method", "request_class"),
    [
        ("Classify", classification_pb2.ClassificationRequest),
        ("Regress", regression_pb2.RegressionRequest),
        ("MultiInference", inference_pb2.MultiInferenceRequest),
    ],
)
def test_methods_of_one_output_are_not_offered(served: Any, method: str, request_class: Any) -> None:
    code, text = fails(getattr(served.prediction, method), request_class())
    assert code == StatusCode.UNIMPLEMENTED and text.startswith(f"{method} ")


def test_unknown_method(served: Any) -> None:
    call = served.channel.unary_unary("/tensorflow.serving.PredictionService/Guess")
    assert fails(call, b"") == (StatusCode.UNIMPLEMENTED, "Method not found!")


def test_bytes_that_are_no_message(served: Any, good: predict_pb2.PredictRequest) -> None:
    call = served.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    assert fails(call, b"\xff\xff") == (StatusCode.INTERNAL, "the request is not a tensorflow.serving.PredictRequest")
    assert served.predict(good)["click"] == [12]


def test_errors_of_the_graph_keep_their_code(served: Any, request_for: RequestFor) -> None:
    code, text = fails(served.prediction.Predict, request_for(user=[1, 2], item=[1, 2, 3]))
    assert code == StatusCode.INVALID_ARGUMENT and text.startswith("Incompatible shapes: [3] vs. [2]")
    code, text = fails(served.prediction.Predict, request_for("examples", examples=[b"no example"]))
    assert code == StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in text


def test_long_texts_are_cut(served: Any, request_for: RequestFor) -> None:
    code, text = fails(served.prediction.Predict, request_for("x" * 5000, user=[1], item=[2]))
    assert code == StatusCode.FAILED_PRECONDITION
    start = 'Serving signature key "'
    assert text == start + "x" * (1024 - len(start)) + "...TRUNCATED"
