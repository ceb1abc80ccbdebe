"""A server that speaks TensorFlow Serving's own messages and misbehaves when told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

from stem_client import AsyncRankingClient, RankingClient, RetryPolicy

# feature: type, trailing shape, per item
FEATURES = {
    "user_id": (tf.int64, [], False),
    "interests": (tf.string, [-1], False),
    "taste": (tf.float32, [3], False),
    "hour": (tf.int64, [], False),
    "video_id": (tf.int64, [], True),
    "title": (tf.string, [], True),
    "topics": (tf.int64, [-1], True),
    "seconds": (tf.float32, [], True),
    "image": (tf.float32, [2], True),
}
Features = dict[str, tuple[Any, list[int], bool]]


def shape_of(sizes: list[int]) -> Any:
    return tf.TensorShape([None if size < 0 else size for size in sizes]).as_proto()


class Ranker(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Scores: click = video_id / 1000, like = seconds (0 where missing), in float_val unless ``encode`` says otherwise.

    Attributes:
      version, labels, features, tasks: of the served model; setting them is a deployment.
      encode: (scores [..., N]) -> TensorProto.
      faults: one is taken for every Predict: (code, details), seconds to wait first, a function that changes the
        answer, or None.
      requests, metadata_requests, peers: what came, and over which connections.
    """

    def __init__(self) -> None:
        self.version = 3
        self.labels = {"stable": 3}
        self.features: Features = dict(FEATURES)
        self.tasks: tuple[str, ...] = ("click", "like")
        self.encode: Callable[[np.ndarray], Any] = lambda scores: tf.make_tensor_proto(scores)
        self.faults: deque[Any] = deque()
        self.requests: list[Any] = []
        self.metadata_requests = 0
        self.peers: set[str] = set()

    def signature(self, name: str) -> Any:
        definition = tf.compat.v1.MetaGraphDef().signature_def["x"]
        lead = [-1, -1] if name == "rank" else [-1]
        for feature, (dtype, shape, per_item) in self.features.items():
            info = definition.inputs[feature]
            info.name, info.dtype = f"{name}_{feature}:0", dtype.as_datatype_enum
            info.tensor_shape.CopyFrom(shape_of((lead if per_item else [-1]) + shape))
        for task in self.tasks:
            info = definition.outputs[task]
            info.name, info.dtype = f"{task}:0", tf.float32.as_datatype_enum
            info.tensor_shape.CopyFrom(shape_of(lead))
        definition.method_name = "tensorflow/serving/predict"
        return definition

    def GetModelMetadata(self, request: Any, context: Any) -> Any:
        self.metadata_requests += 1
        assert list(request.metadata_field) == ["signature_def"]
        self._check_spec(request.model_spec, context)
        answer = get_model_metadata_pb2.GetModelMetadataResponse()
        answer.model_spec.name = request.model_spec.name
        answer.model_spec.version.value = self.version
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name in ("rank", "serving_default"):
            signatures.signature_def[name].CopyFrom(self.signature(name))
        answer.metadata["signature_def"].Pack(signatures)
        return answer

    def Predict(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.peers.add(context.peer())
        fault = self.faults.popleft() if self.faults else None
        if isinstance(fault, tuple):
            context.abort(*fault)
        if isinstance(fault, int | float):
            time.sleep(fault)
        self._check_spec(request.model_spec, context)
        if set(request.inputs) != set(self.features):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "input size does not match signature")
        answer = predict_pb2.PredictResponse()
        answer.model_spec.CopyFrom(request.model_spec)
        answer.model_spec.version.value = self.version
        arrays = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        answer.outputs["click"].CopyFrom(self.encode((arrays["video_id"] / 1000).astype(np.float32)))
        seconds = np.nan_to_num(arrays["seconds"].astype(np.float32), posinf=np.inf, neginf=-np.inf)
        answer.outputs["like"].CopyFrom(self.encode(seconds))
        if callable(fault):
            fault(answer)
        return answer

    def _check_spec(self, spec: Any, context: Any) -> None:
        if spec.name != "ranker":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({spec.name})")
        if spec.version_label and self.labels.get(spec.version_label) != self.version:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"Unrecognized servable version label: {spec.version_label}"
            )
        if spec.HasField("version") and spec.version.value != self.version:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Specific(ranker, {spec.version.value})"
            )

    def arrays(self, place: int = -1) -> dict[str, np.ndarray]:
        """A request's inputs, read by TensorFlow."""
        return {name: tf.make_ndarray(tensor) for name, tensor in self.requests[place].inputs.items()}


@pytest.fixture(scope="session")
def feature_types() -> Features:
    """What the model of these tests takes."""
    return FEATURES


@pytest.fixture
def ranker() -> Ranker:
    return Ranker()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """``serve(ranker)``: the address of a server; ``serve.stop(address)`` ends it in the middle of its calls."""
    servers: dict[str, Any] = {}

    def start(ranker: Any, workers: int = 4) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(workers), options=[("grpc.so_reuseport", 0)])
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(ranker, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        servers[address] = server
        return address

    start.stop = lambda address: servers.pop(address).stop(None).wait()  # type: ignore[attr-defined]
    yield start
    for server in servers.values():
        server.stop(None).wait()


@pytest.fixture
def target(ranker: Ranker, serve: Callable[..., str]) -> str:
    return serve(ranker)


class Awaited:
    """An `AsyncRankingClient` on an event loop of its own, with the methods of a `RankingClient`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.client = AsyncRankingClient(*arguments, **settings)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            coroutine = getattr(self.client, name)(*arguments, **settings)
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

        return call

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(params=[RankingClient, Awaited], ids=["sync", "asyncio"])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes a client, of threads or of an event loop."""
    return request.param


@pytest.fixture
def client(target: str) -> Iterator[RankingClient]:
    """With retries that wait little, and time for a slow machine."""
    retry = RetryPolicy(first_backoff=0.001, max_backoff=0.005)
    with RankingClient(target, timeout=20, retry=retry) as client:
        yield client


@pytest.fixture
def user() -> dict[str, Any]:
    return {"user_id": 42, "interests": ["ski", "jazz"], "taste": [0.5, 1, -1], "hour": 21}


@pytest.fixture
def items() -> dict[str, Any]:
    return {
        "video_id": [7, 8, 2**62],
        "title": ["un été", "b", "c"],
        "topics": [[1, 2], [], [3]],
        "seconds": [1.5, 2, 30],
        "image": [[1, 2], [3, 4], [5, 6]],
    }
