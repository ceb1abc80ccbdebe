"""The gRPC services in front of the versions: PredictionService, ModelService, health, reflection."""

from __future__ import annotations

import functools
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

from export.server.models import Models
from export.server.status import StatusError, invalid_argument, not_found

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
# TensorFlow Serving's health service knows its services by their short names.
HEALTH_SERVICES = ("", PREDICTION_SERVICE, MODEL_SERVICE, "PredictionService", "ModelService")
_METADATA_FIELD = "signature_def"
_CONTROL_WORKERS = 4


class _Method(NamedTuple):
    request: type[Message]
    response: type[Message]


_SERVICES: dict[str, dict[str, _Method]] = {
    PREDICTION_SERVICE: {
        "Classify": _Method(classification_pb2.ClassificationRequest, classification_pb2.ClassificationResponse),
        "Regress": _Method(regression_pb2.RegressionRequest, regression_pb2.RegressionResponse),
        "Predict": _Method(predict_pb2.PredictRequest, predict_pb2.PredictResponse),
        "MultiInference": _Method(inference_pb2.MultiInferenceRequest, inference_pb2.MultiInferenceResponse),
        "GetModelMetadata": _Method(
            get_model_metadata_pb2.GetModelMetadataRequest, get_model_metadata_pb2.GetModelMetadataResponse
        ),
    },
    MODEL_SERVICE: {
        "GetModelStatus": _Method(
            get_model_status_pb2.GetModelStatusRequest, get_model_status_pb2.GetModelStatusResponse
        ),
        "HandleReloadConfigRequest": _Method(
            model_management_pb2.ReloadConfigRequest, model_management_pb2.ReloadConfigResponse
        ),
    },
}
_FILES = {
    PREDICTION_SERVICE: "tensorflow_serving/apis/prediction_service.proto",
    MODEL_SERVICE: "tensorflow_serving/apis/model_service.proto",
}


class Answers:
    """What each method answers: a response message, or a StatusError."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        with self._models.use(request.model_spec) as servable:
            return servable.predict(request)

    def get_model_metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        if not request.metadata_field:
            raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != _METADATA_FIELD:
                raise invalid_argument(f"Metadata field {field} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._models.use(request.model_spec) as servable:
            response.model_spec.name = servable.name
            response.model_spec.version.value = servable.version
            response.metadata[_METADATA_FIELD].CopyFrom(servable.metadata)
        return response

    def get_model_status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        spec = request.model_spec
        statuses = self._models.statuses(spec.name)
        if spec.HasField("version"):
            statuses = {version: x for version, x in statuses.items() if version == spec.version.value}
            if not statuses:
                raise not_found(f"Could not find version {spec.version.value} of model {spec.name}")
        if not statuses:
            raise not_found(f"Could not find any versions of model {spec.name}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, status in statuses.items():
            added = response.model_version_status.add(version=version, state=status.state)
            added.status.error_code, added.status.error_message = status.code, status.text
        return response

    def handle_reload_config_request(
        self, request: model_management_pb2.ReloadConfigRequest
    ) -> model_management_pb2.ReloadConfigResponse:
        self._models.reload(request.config)
        return model_management_pb2.ReloadConfigResponse()


def _unimplemented(method: str, request: Message) -> Message:
    del request
    raise StatusError(
        grpc.StatusCode.UNIMPLEMENTED,
        f"{method} answers one task only and is not offered; Predict answers all tasks by name",
    )


class _CountingPool(futures.ThreadPoolExecutor):
    """A thread pool that knows how many calls it holds, waiting ones included."""

    def __init__(self, workers: int, prefix: str) -> None:
        super().__init__(workers, thread_name_prefix=prefix)
        self._count_lock = threading.Lock()
        self.held = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        with self._count_lock:
            self.held += 1
        future.add_done_callback(self._done)
        return future

    def _done(self, future: futures.Future[Any]) -> None:
        del future
        with self._count_lock:
            self.held -= 1


class _Handlers(grpc.GenericRpcHandler):
    """Finds the handler of a method; gRPC asks in its polling thread, before a call takes a worker.

    Predict has workers of its own, and past ``max_calls`` calls in its pool it answers at once. So status, metadata and
    health are answered by a busy server too.
    """

    def __init__(self, answers: Answers, pool: _CountingPool, max_calls: int) -> None:
        self._pool, self._max_calls = pool, max_calls
        self.stopping = False
        methods = {
            "Predict": answers.predict,
            "GetModelMetadata": answers.get_model_metadata,
            "GetModelStatus": answers.get_model_status,
            "HandleReloadConfigRequest": answers.handle_reload_config_request,
        }
        self._handlers = {
            f"/{service}/{name}": _handler(methods.get(name, functools.partial(_unimplemented, name)), method.request)
            for service, methods_of in _SERVICES.items()
            for name, method in methods_of.items()
        }
        self._predict = f"/{PREDICTION_SERVICE}/Predict"
        # grpc looks for this attribute on the behaviour (its health service uses it too).
        self._handlers[self._predict].unary_unary.experimental_thread_pool = pool
        self._exhausted = _refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
        self._unavailable = _refusal(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == self._predict:
            if self.stopping:
                return self._unavailable
            if self._pool.held >= self._max_calls:
                return self._exhausted
        return self._handlers.get(handler_call_details.method)


def _refusal(code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler:
    def refuse(request: predict_pb2.PredictRequest) -> Message:
        del request
        raise StatusError(code, text)

    return _handler(refuse, predict_pb2.PredictRequest)


def _handler(answer: Callable[[Any], Message], request_class: type[Message]) -> grpc.RpcMethodHandler:
    def behave(payload: bytes, context: grpc.ServicerContext) -> Message | None:
        if not context.is_active():
            return None  # The client has gone, or its deadline passed while the call waited.
        try:
            try:
                request = request_class.FromString(payload)
            except DecodeError:
                name = request_class.DESCRIPTOR.full_name
                raise StatusError(grpc.StatusCode.INTERNAL, f"the request is not a {name}") from None
            return answer(request)
        except StatusError as error:
            code, text = error.code, error.text
        except Exception:
            # A bug of ours: the operator gets the traceback, the client a status, and the server lives on.
            traceback.print_exc()
            code, text = grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
        context.abort(code, text)
        raise AssertionError("context.abort does not return")

    return grpc.unary_unary_rpc_method_handler(
        behave, request_deserializer=None, response_serializer=lambda response: response.SerializeToString()
    )


class Server:
    """A gRPC server over ``models``. It is NOT_SERVING until :meth:`serving` is called.

    Args:
      models: what is served.
      address: ``host:port``; port 0 is any free one.
      workers: threads that run Predict.
      max_calls: Predict calls at once, running and waiting; RESOURCE_EXHAUSTED past it.
      max_message_bytes: of a request.

    Raises:
      RuntimeError: the address is taken or not this machine's.
    """

    def __init__(self, models: Models, address: str, *, workers: int, max_calls: int, max_message_bytes: int) -> None:
        self._pool = _CountingPool(workers, "predict")
        control = futures.ThreadPoolExecutor(_CONTROL_WORKERS, thread_name_prefix="control")
        self._grpc = grpc.server(
            control,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # A second server on the same port must fail, not take half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._handlers = _Handlers(Answers(models), self._pool, max_calls)
        self._grpc.add_generic_rpc_handlers((self._handlers,))
        self._health = health.HealthServicer()
        self._is_serving = False
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = [*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME]
        _describe_services()
        reflection.enable_server_reflection(names, self._grpc)
        self.port = self._grpc.add_insecure_port(address)
        self._grpc.start()

    def serving(self) -> None:
        """Health says SERVING from now on."""
        if not self._is_serving:  # watchers are told about changes only
            self._is_serving = True
            self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def drain(self, grace_seconds: float) -> bool:
        """Health says NOT_SERVING, Predict UNAVAILABLE, calls in flight end. False if some had to be cancelled.

        The port closes last. gRPC's own graceful stop would close it first: calls that had arrived but were not yet
        read would be CANCELLED, which no client retries, and whoever watches health would hold it for the whole time.
        """
        self._health.enter_graceful_shutdown()
        self._handlers.stopping = True
        end = time.monotonic() + grace_seconds
        while self._pool.held and time.monotonic() < end:
            time.sleep(0.01)
        drained = not self._pool.held
        self._grpc.stop(0.1).wait()
        return drained

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in HEALTH_SERVICES:
            self._health.set(service, status)


def default_workers() -> int:
    """TensorFlow Serving's default: four threads a core."""
    return 4 * len(os.sched_getaffinity(0))


def _describe_services() -> None:
    """Adds the two services to protobuf's pool, for reflection.

    tensorflow_serving's own modules for them were generated for protobuf 3 and do not import with protobuf 4; these are
    the same two files.
    """
    pool = descriptor_pool.Default()
    for service, methods in _SERVICES.items():
        package, _, short = service.rpartition(".")
        messages = [message.DESCRIPTOR for method in methods.values() for message in method]
        file = descriptor_pb2.FileDescriptorProto(
            name=_FILES[service],
            package=package,
            syntax="proto3",
            dependency=dict.fromkeys(descriptor.file.name for descriptor in messages),
        )
        if service == PREDICTION_SERVICE:
            file.options.cc_enable_arenas = True
        described = file.service.add(name=short)
        for name, method in methods.items():
            described.method.add(
                name=name,
                input_type=f".{method.request.DESCRIPTOR.full_name}",
                output_type=f".{method.response.DESCRIPTOR.full_name}",
            )
        pool.AddSerializedFile(file.SerializeToString())
