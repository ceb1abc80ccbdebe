"""TensorFlow Serving's REST API: predict, status, metadata.

JSON is read and written in a separate thread, large JSON in a separate process. The calls have the same limits, queue
and deadlines as gRPC calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from aiohttp import web
from google.protobuf.json_format import MessageToDict
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2, predict_pb2

from export.server import rest_json, rest_worker, tensors
from export.server.access_log import request_id
from export.server.models import Models
from export.server.observation import Observation
from export.server.rest_worker import Worker
from export.server.security import Tokens
from export.server.servable import DEFAULT_SIGNATURE, Servable
from export.server.status import STOPPING, StatusError, invalid_argument
from export.server.web import SOFTWARE, BodyError, Handler, read_body

CONNECTIONS = 1024
_HELD_BYTES = 256 << 20  # of all bodies together that are being read or answered
_LARGE_BYTES, _LARGE_ELEMENTS = 64 << 10, 5000  # of bodies and answers for the other process
_BODY_SECONDS = 10.0
_NAME = r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_PREDICT = re.compile(_NAME + ":(?P<method>predict|classify|regress)", re.IGNORECASE)
_STATUS = re.compile(_NAME, re.IGNORECASE)
_METADATA = re.compile(_NAME + "/metadata", re.IGNORECASE)

# TensorFlow Serving's.
HTTP_STATUS = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

Predict = Callable[[bytes, float, Observation], Awaitable[predict_pb2.PredictResponse]]


@dataclasses.dataclass
class Backend:
    """The parts of the server that answer.

    Attributes:
      models: what is served.
      predict: answers a serialised PredictRequest before a time of ``time.monotonic()``, or raises StatusError; fills
        in the observation.
      status, metadata: the same of ModelService and PredictionService.
      stopping: whether new calls are refused.
    """

    models: Models
    predict: Predict
    status: Callable[[get_model_status_pb2.GetModelStatusRequest], get_model_status_pb2.GetModelStatusResponse]
    metadata: Callable[
        [get_model_metadata_pb2.GetModelMetadataRequest], get_model_metadata_pb2.GetModelMetadataResponse
    ]
    stopping: Callable[[], bool]


class Rest:
    """Answers HTTP requests.

    Args:
      backend: answers.
      timeout_seconds: of a call, without the time to read its body.
      max_body_bytes: of a request, decompressed.
      tokens: which clients must have one of.
      observe: called after each call.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        timeout_seconds: float,
        max_body_bytes: int,
        tokens: Tokens | None = None,
        observe: Callable[[Observation], None] | None = None,
    ) -> None:
        self._backend, self._timeout, self._max_body_bytes = backend, timeout_seconds, max_body_bytes
        self._tokens, self._observe = tokens, observe
        self._worker = Worker()
        self._json = futures.ThreadPoolExecutor(1, thread_name_prefix="json")
        self._held = 0

    @property
    def handler(self) -> Handler:
        """The handler for `export.server.web`."""
        return self._answer

    def close(self) -> None:
        """Ends the process that reads large JSON."""
        self._worker.close()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        begun = time.monotonic()
        seen = Observation("", "REST", peer=request.remote or "")
        seen.request_id = request_id(request.headers.get("x-request-id"))
        headers = {"x-request-id": seen.request_id, "Server": SOFTWARE}
        status, body = 0, b""
        try:
            body = await self._called(request, seen)
        except StatusError as error:
            seen.code, seen.text = error.code, error.text
            body = rest_json.error(error.text)
        except BodyError as error:
            seen.code, seen.text, status = grpc.StatusCode.INVALID_ARGUMENT, str(error), error.status
            headers["Connection"] = "close"  # the rest of the body is not read
            body = rest_json.error(str(error))
        except asyncio.CancelledError:
            seen.code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            seen.code = grpc.StatusCode.INTERNAL
            raise
        finally:
            seen.seconds = time.monotonic() - begun
            seen.response_bytes = len(body)
            if self._observe is not None:
                self._observe(seen)
        if seen.code is grpc.StatusCode.UNAUTHENTICATED:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(
            body=body,
            status=status or HTTP_STATUS.get(seen.code, 500),
            headers=headers,
            content_type="application/json",
        )

    async def _called(self, request: web.BaseRequest, seen: Observation) -> bytes:
        if self._tokens is not None:
            self._tokens.check(request.headers.get("Authorization"))
        path = request.rel_url.raw_path
        if not path.lower().startswith("/v1/"):
            raise StatusError(grpc.StatusCode.NOT_FOUND, "the REST API is below /v1/models/")
        if request.method == "POST" and (match := _PREDICT.fullmatch(path)):
            seen.method = match["method"].capitalize()
            spec = _spec(match, seen)
            return await self._predict(request, spec, seen)
        if request.method == "GET" and (match := _METADATA.fullmatch(path)):
            seen.method = "GetModelMetadata"
            return self._metadata(_spec(match, seen))
        if request.method == "GET" and (match := _STATUS.fullmatch(path)):
            seen.method = "GetModelStatus"
            asked = get_model_status_pb2.GetModelStatusRequest(model_spec=_spec(match, seen))
            return _json(self._backend.status(asked))
        raise invalid_argument(f"Malformed request: {request.method} {path}")

    async def _predict(self, request: web.BaseRequest, spec: model_pb2.ModelSpec, seen: Observation) -> bytes:
        if seen.method != "Predict":
            raise StatusError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"{seen.method} answers one task only and is not offered; predict answers all tasks by name",
            )
        if self._backend.stopping():
            raise StatusError(grpc.StatusCode.UNAVAILABLE, STOPPING)
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if self._held + size > _HELD_BYTES:
                raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the bodies of other calls fill the memory")
            self._held, held = self._held + size, held + size

        try:
            body = await read_body(request, self._max_body_bytes, _BODY_SECONDS, take)
            seen.request_bytes = len(body)
            deadline = time.monotonic() + self._timeout
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._score(body, spec, deadline, seen)
            except TimeoutError:
                raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer in {self._timeout:g} s") from None
        finally:
            self._held -= held

    async def _score(self, body: bytes, spec: model_pb2.ModelSpec, deadline: float, seen: Observation) -> bytes:
        loop = asyncio.get_running_loop()
        payload, rows = await loop.run_in_executor(self._json, self._read, body, spec, deadline)
        response = await self._backend.predict(payload, deadline, seen)
        return await loop.run_in_executor(self._json, self._written, response, rows)

    def _read(self, body: bytes, spec: model_pb2.ModelSpec, deadline: float) -> tuple[bytes, bool]:
        """Returns a serialised PredictRequest, and whether the answer is by row."""
        if time.monotonic() > deadline:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed while the call waited")
        with self._backend.models.use(spec) as servable:
            types = _types(servable)
        read = rest_worker.read if len(body) < _LARGE_BYTES else functools.partial(self._worker.call, "read")
        signature, rows, arrays = read(body, types)
        request = predict_pb2.PredictRequest(model_spec=spec)
        request.model_spec.signature_name = signature
        for name, array in arrays.items():
            tensors.encode(array, request.inputs[name], as_content=True)
        return request.SerializeToString(), rows

    def _written(self, response: predict_pb2.PredictResponse, rows: bool) -> bytes:
        arrays = {name: tensors.decode(proto) for name, proto in sorted(response.outputs.items())}
        if sum(array.size for array in arrays.values()) < _LARGE_ELEMENTS:
            return rest_json.answer(arrays, rows)
        answer: bytes = self._worker.call("answer", arrays, rows)
        return answer

    def _metadata(self, spec: model_pb2.ModelSpec) -> bytes:
        asked = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
        answer = self._backend.metadata(asked)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        # TensorFlow Serving writes the version as a number, without the braces of its message.
        tree = {"model_spec": _tree(answer.model_spec), "metadata": {"signature_def": _tree(signatures)}}
        return json.dumps(tree, indent=1).encode()


def _spec(match: re.Match[str], seen: Observation) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=_unquoted(match["name"]))
    seen.model = spec.name
    if match["version"] is not None:
        if int(match["version"][:20]) >= 1 << 63:
            raise invalid_argument(f"Failed to convert version: {match['version'][:20]} to numeric.")
        spec.version.value = seen.version = int(match["version"])
    elif match["label"] is not None:
        spec.version_label = _unquoted(match["label"])
    return spec


def _unquoted(text: str) -> str:
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise invalid_argument(f"Malformed request: {text} is not UTF-8") from None


@functools.lru_cache(maxsize=16)
def _types_of(signature_defs: bytes) -> rest_worker.Types:
    signatures = get_model_metadata_pb2.SignatureDefMap.FromString(signature_defs).signature_def
    types = {
        key: {name: np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype) for name, info in signature.inputs.items()}
        for key, signature in signatures.items()
    }
    return types | ({"": types[DEFAULT_SIGNATURE]} if DEFAULT_SIGNATURE in types else {})


def _types(servable: Servable) -> rest_worker.Types:
    """Types of inputs by signature; the default signature is also under ""."""
    return _types_of(servable.metadata.value)


def _tree(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, including_default_value_fields=True)


def _json(message: Any) -> bytes:
    return json.dumps(_tree(message), indent=1).encode()
