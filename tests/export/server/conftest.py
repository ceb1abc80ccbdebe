"""A small model, versions of it, and the server in front of them, asked over a gRPC channel."""

from __future__ import annotations

import dataclasses
import functools
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

from export.server.configuration import Model
from export.server.models import Models
from export.server.servable import Servable
from export.server.service import Server
from export.server.versions import Versions
from pipelines import tfrecord


class Ranker(tf.Module):
    """``click = weight * user + item``, ``like = click + 1``: scores that a reader works out in the head.

    ``serving_default`` takes user [B] and item [B]; ``rank`` user [B] and item [B, N]; ``examples`` tf.Example [B].
    ``types`` gives back what it gets; ``slow`` counts to ``turns`` [].
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = tf.Variable(weight, dtype=tf.float32)

    def _scores(self, user: tf.Tensor, item: tf.Tensor) -> dict[str, tf.Tensor]:
        click = self.weight * tf.cast(user, tf.float32) + tf.cast(item, tf.float32)
        return {"click": click, "like": click + 1}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, "user"), tf.TensorSpec([None], tf.int64, "item")])
    def serving_default(self, user: tf.Tensor, item: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._scores(user, item)

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.int64, "user"), tf.TensorSpec([None, None], tf.int64, "item")]
    )
    def rank(self, user: tf.Tensor, item: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._scores(user[:, None], item)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
    def examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        spec = {name: tf.io.FixedLenFeature([], tf.int64) for name in ("user", "item")}
        parsed = tf.io.parse_example(examples, spec)
        return self._scores(parsed["user"], parsed["item"])

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "text"),
            tf.TensorSpec([None], tf.float32, "number"),
            tf.TensorSpec([None], tf.bool, "flag"),
        ]
    )
    def types(self, text: tf.Tensor, number: tf.Tensor, flag: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "text": tf.strings.join([text, "!"]),
            "number": -number,
            "flag": ~flag,
            "length": tf.strings.length(text),
        }

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64, "turns")])
    def slow(self, turns: tf.Tensor) -> dict[str, tf.Tensor]:
        turn = tf.zeros_like(turns)
        while turn < turns:
            turn += 1
        return {"turn": turn}


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    @functools.cache
    def save(weight: float) -> Path:
        model, path = Ranker(weight), tmp_path_factory.mktemp("saved") / "model"
        keys = ("serving_default", "rank", "examples", "types", "slow")
        tf.saved_model.save(model, str(path), signatures={key: getattr(model, key) for key in keys})
        return path

    return save


Publish = Callable[..., Path]


@pytest.fixture(scope="session")
def publish(_saved: Callable[[float], Path]) -> Publish:
    """``publish(base, version, weight=1.0, warm_up=[request])``: beside, then renamed, as an export does it."""

    def put(
        base: Path, version: int, weight: float = 1.0, warm_up: list[predict_pb2.PredictRequest] | None = None
    ) -> Path:
        beside = base / f".{version}.partial"
        shutil.copytree(_saved(weight), beside)
        if warm_up is not None:
            (beside / "assets.extra").mkdir()
            with tfrecord.Writer(str(beside / "assets.extra/tf_serving_warmup_requests")) as writer:
                for request in warm_up:
                    log = prediction_log_pb2.PredictLog(request=request)
                    writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())
        return beside.rename(base / str(version))

    return put


@dataclasses.dataclass
class Running:
    """A server in this process, and the calls that tests make over its port."""

    base: Path
    models: Models
    versions: Versions
    server: Server
    port: int
    channel: grpc.Channel
    reports: list[str]

    def __post_init__(self) -> None:
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def predict(self, request: predict_pb2.PredictRequest, timeout: float = 20) -> dict[str, np.ndarray]:
        response = self.prediction.Predict(request, timeout=timeout)
        return {alias: tf.make_ndarray(proto) for alias, proto in response.outputs.items()}

    def states(self, version: int | None = None) -> list[tuple[int, str]]:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "ranker"
        if version is not None:
            request.model_spec.version.value = version
        names = get_model_status_pb2.ModelVersionStatus.State.Name
        statuses = self.model.GetModelStatus(request, timeout=20).model_version_status
        return [(status.version, names(status.state)) for status in statuses]

    def metadata(self, *fields: str) -> get_model_metadata_pb2.GetModelMetadataResponse:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
        request.model_spec.name = "ranker"
        return self.prediction.GetModelMetadata(request, timeout=20)

    def health_of(self, service: str) -> str:
        status = self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def _frozen() -> None:
    """As stem-serve does it: unloading collects, which takes long where there are many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def start_server(_frozen: None) -> Iterator[Start]:
    """``start_server(base)``: a server over ``base``; tests poll by hand. It ends with the module at the latest."""
    running: list[Running] = []

    def start(base: Path, **options: Any) -> Running:
        reports: list[str] = []
        watched: list[Versions] = []

        def watch(model: Model) -> Versions:
            versions = Versions(
                model,
                Servable,
                poll_seconds=0.1,
                report=lambda model, line: reports.append(line),
                on_serving=lambda servable, before, seconds: server.serving(),
            )
            watched.append(versions)
            return versions

        models = Models([Model("ranker", base)], watch, lambda model, line: reports.append(line), reloads=True)
        server = Server(models, **({"threads": 2} | options))
        port = server.listen("127.0.0.1", 0)
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        running.append(Running(base, models, watched[0], server, port, channel, reports))
        return running[-1]

    yield start
    for each in running:
        each.channel.close()
        each.server.close()
        each.versions.stop(timeout=5)


@pytest.fixture(scope="module")
def served(start_server: Start, publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Version 7 of the model, ``click = 10 * user + item``, for tests that only ask."""
    base = tmp_path_factory.mktemp("served")
    publish(base, 7, 10.0)
    running = start_server(base)
    running.versions.poll()
    return running


@pytest.fixture(scope="session")
def request_for() -> Callable[..., predict_pb2.PredictRequest]:
    """``request_for("rank", user=[1], item=[[2, 3]])``: a PredictRequest; keyword ``outputs`` filters outputs."""

    def make(signature: str = "", /, outputs: tuple[str, ...] = (), **inputs: Any) -> predict_pb2.PredictRequest:
        request = predict_pb2.PredictRequest(output_filter=outputs)
        request.model_spec.name, request.model_spec.signature_name = "ranker", signature
        for alias, values in inputs.items():
            request.inputs[alias].CopyFrom(
                tf.make_tensor_proto(values if isinstance(values, np.ndarray) else np.array(values))
            )
        return request

    return make
