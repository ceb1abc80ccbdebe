"""What the server answers when all is well: values, types, encodings, metadata, health, reflection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2

RequestFor = Callable[..., predict_pb2.PredictRequest]


def test_scores_by_name_and_the_spec_resolved(served: Any, request_for: RequestFor) -> None:
    response = served.prediction.Predict(request_for(user=[1, 2], item=[3, 4]), timeout=20)
    assert response.model_spec.name == "ranker"
    assert response.model_spec.version.value == 7
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == {"click", "like"}
    # As TensorFlow Serving: values in float_val, no tensor_content.
    click = response.outputs["click"]
    assert click.dtype == types_pb2.DT_FLOAT and list(click.float_val) == [13, 24] and not click.tensor_content
    assert [dimension.size for dimension in click.tensor_shape.dim] == [2]


def test_rank_gives_a_score_for_each_candidate(served: Any, request_for: RequestFor) -> None:
    scores = served.predict(request_for("rank", user=[1, 2], item=[[3, 4, 5], [6, 7, 8]]))
    np.testing.assert_array_equal(scores["click"], np.array([[13, 14, 15], [26, 27, 28]], np.float32))
    np.testing.assert_array_equal(scores["like"], scores["click"] + 1)


def test_examples(served: Any, request_for: RequestFor) -> None:
    example = tf.train.Example()
    for name, value in (("user", 1), ("item", 5)):
        example.features.feature[name].int64_list.value.append(value)
    scores = served.predict(request_for("examples", examples=[example.SerializeToString()] * 2))
    assert scores["click"].tolist() == [15, 15]


def test_output_filter(served: Any, request_for: RequestFor) -> None:
    scores = served.predict(request_for(user=[1], item=[2], outputs=("like",)))
    assert list(scores) == ["like"] and scores["like"] == [13]
    assert set(served.predict(request_for(user=[1], item=[2], outputs=("like", "click")))) == {"click", "like"}


def test_version_by_number(served: Any, request_for: RequestFor) -> None:
    request = request_for(user=[1], item=[2])
    request.model_spec.version.value = 7
    assert served.predict(request)["click"] == [12]


def test_zero_rows(served: Any, request_for: RequestFor) -> None:
    none = np.empty(0, np.int64)
    assert served.predict(request_for(user=none, item=none))["click"].shape == (0,)
    scores = served.predict(request_for("rank", user=[1], item=np.empty((1, 0), np.int64)))
    assert scores["click"].shape == (1, 0) and scores["click"].dtype == np.float32


def test_content_and_values_are_read_alike(served: Any, request_for: RequestFor) -> None:
    request = request_for(user=[1, 2, 3], item=[4, 5, 6])
    assert request.inputs["user"].tensor_content and not request.inputs["user"].int64_val
    request.inputs["item"].ClearField("tensor_content")
    request.inputs["item"].int64_val.extend([4, 5, 6])
    assert served.predict(request)["click"].tolist() == [14, 25, 36]


def test_one_value_broadcasts(served: Any, request_for: RequestFor) -> None:
    request = request_for("rank", user=[1], item=[[0, 0, 0]])
    request.inputs["item"].ClearField("tensor_content")
    assert served.predict(request)["click"].tolist() == [[10, 10, 10]]
    request.inputs["item"].int64_val[:] = [5]
    assert served.predict(request)["click"].tolist() == [[15, 15, 15]]
    request.inputs["item"].int64_val[:] = [5, 6]
    assert served.predict(request)["click"].tolist() == [[15, 16, 16]]
    request.inputs["item"].int64_val[:] = [5, 6, 7, 8]
    assert served.predict(request)["click"].tolist() == [[15, 16, 17]]


def test_strings_floats_and_bools(served: Any, request_for: RequestFor) -> None:
    inputs = {"text": ["über", ""], "number": np.array([1.5, np.nan], np.float32), "flag": [True, False]}
    answers = served.predict(request_for("types", **inputs))
    assert answers["text"].tolist() == ["über!".encode(), b"!"]
    np.testing.assert_array_equal(answers["number"], np.array([-1.5, np.nan], np.float32))
    assert answers["flag"].tolist() == [False, True]
    assert answers["length"].tolist() == [5, 0] and answers["length"].dtype == np.int32
    one = request_for("types", **inputs)
    one.inputs["text"].string_val[:] = [b"a"]
    one.inputs["number"].ClearField("tensor_content")
    one.inputs["number"].float_val[:] = [2.0]
    one.inputs["flag"].ClearField("tensor_content")
    one.inputs["flag"].bool_val[:] = [True]
    answers = served.predict(one)
    assert answers["text"].tolist() == [b"a!", b"a!"] and answers["number"].tolist() == [-2, -2]
    assert answers["flag"].tolist() == [False, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.tensor_shape.dim[0].__setattr__("size", -1),
        lambda x: x.tensor_shape.dim.extend([x.tensor_shape.dim[0]] * 300),
        lambda x: x.tensor_shape.__setattr__("unknown_rank", True),
        lambda x: x.__setattr__("dtype", types_pb2.DT_INVALID),
        lambda x: x.__setattr__("dtype", types_pb2.DT_RESOURCE),
        lambda x: x.__setattr__("dtype", 987),
        lambda x: x.__setattr__("tensor_content", b"1234567"),
    ],
)
def test_hostile_tensors_are_refused_and_the_server_lives(
    served: Any, request_for: RequestFor, change: Callable[[tensor_pb2.TensorProto], None]
) -> None:
    request = request_for(user=[1], item=[2])
    change(request.inputs["user"])
    with pytest.raises(grpc.RpcError) as caught:
        served.predict(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "tensor parsing error: user"
    assert served.predict(request_for(user=[1], item=[2]))["click"] == [12]


def test_tensor_content_if_asked_for(start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 1)
    running = start_server(tmp_path, as_content=True)
    running.versions.poll()
    response = running.prediction.Predict(request_for(user=[1], item=[2]), timeout=20)
    assert response.outputs["click"].tensor_content == np.float32(3).tobytes()
    assert not response.outputs["click"].float_val


def test_a_request_too_large(start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 1)
    running = start_server(tmp_path, max_message_bytes=10_000)
    running.versions.poll()
    rows = np.zeros(1000, np.int64)
    with pytest.raises(grpc.RpcError) as caught:
        running.predict(request_for(user=rows, item=rows))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running.predict(request_for(user=[1], item=[2]))["click"] == [3]


def test_metadata(served: Any) -> None:
    response = served.metadata("signature_def")
    assert (response.model_spec.name, response.model_spec.version.value) == ("ranker", 7)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    rank = signatures.signature_def["rank"]
    assert rank.inputs["item"].dtype == types_pb2.DT_INT64
    assert [dimension.size for dimension in rank.inputs["item"].tensor_shape.dim] == [-1, -1]
    assert set(rank.outputs) == {"click", "like"}


def test_status(served: Any) -> None:
    assert served.states() == [(7, "AVAILABLE")] == served.states(7)


def test_health_by_service(served: Any) -> None:
    for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "PredictionService"):
        assert served.health_of(service) == "SERVING"
    with pytest.raises(grpc.RpcError) as caught:
        served.health_of("nope")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_services(served: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tensorflow.serving.PredictionService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tensorflow.serving.PredictRequest"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tensorflow.TensorProto"),
    ]
    services, *files = stub.ServerReflectionInfo(iter(requests), timeout=20)
    names = {service.name for service in services.list_services_response.service}
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "grpc.health.v1.Health"} <= names
    assert all(file.file_descriptor_response.file_descriptor_proto for file in files)


def test_more_calls_than_the_limit(start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 1)
    running = start_server(tmp_path, threads=1, max_calls=2)
    running.versions.poll()
    slow = [
        running.prediction.Predict.future(request_for("slow", turns=np.int64(200_000)), timeout=20) for _ in range(2)
    ]
    wait_for(lambda: running.server.answers.held == 2)
    with pytest.raises(grpc.RpcError) as caught:
        running.predict(request_for(user=[1], item=[2]))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "Server Threadpool Exhausted"
    # Probes and status are answered by a full server.
    assert running.health_of("") == "SERVING" and running.states() == [(1, "AVAILABLE")]
    for call in slow:
        call.cancel()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


def test_many_clients_at_once(served: Any, request_for: RequestFor) -> None:
    wrong: list[Any] = []

    def ask(user: int) -> None:
        for item in range(50):
            scores = served.predict(request_for("rank", user=[user], item=[[item, item + 1]]))
            if scores["click"].tolist() != [[10 * user + item, 10 * user + item + 1]]:
                wrong.append((user, item, scores))

    threads = [threading.Thread(target=ask, args=(user,)) for user in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
