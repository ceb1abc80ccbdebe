"""The answer of each method of the services, for gRPC and REST."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent import futures
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_management_pb2, predict_pb2

from export.server import tensors
from export.server.batching import Call, Scheduler
from export.server.limits import Limits
from export.server.models import Models
from export.server.observation import Observation
from export.server.servable import DEFAULT_SIGNATURE
from export.server.status import StatusError, invalid_argument, not_found

_METADATA_FIELD = "signature_def"
_MAX_FIELDS = 10_000  # inputs and outputs that a request may name
_LARGE = 256 << 10  # bytes of a request that is read in a thread
_MANY = 10_000  # rows of a call that holds much memory

_M = TypeVar("_M", bound=Message)


class Answers:
    """Answers each method with a response message, or raises a StatusError.

    Args:
      models: what is served.
      limits: of a request.
      scheduler: runs Predict.
      max_calls: Predict calls running and waiting; RESOURCE_EXHAUSTED past it.
      as_content: answer with ``tensor_content`` in place of the `*_val` fields.

    Attributes:
      held: Predict calls running and waiting.
      large: the time (``time.monotonic()``) of the last call that used much memory; None after the memory was returned.
    """

    def __init__(
        self, models: Models, limits: Limits, scheduler: Scheduler, *, max_calls: int, as_content: bool
    ) -> None:
        self._models, self._limits, self._scheduler = models, limits, scheduler
        self._max_calls, self._as_content = max_calls, as_content
        # Parsing a large request takes long. In a thread, Python can serve other calls meanwhile.
        self._reader = futures.ThreadPoolExecutor(1, thread_name_prefix="read")
        self.held = 0
        self.large: float | None = None

    async def predict(
        self, payload: bytes, deadline: float = math.inf, observation: Observation | None = None
    ) -> predict_pb2.PredictResponse:
        """Scores what the serialised PredictRequest ``payload`` asks for.

        Args:
          payload: the bytes as received.
          deadline: by ``time.monotonic()``.
          observation: of the call; what is found out is written into it, also if the call fails.

        Raises:
          StatusError: as TensorFlow Serving answers it.
        """
        self._check_number()
        self.held += 1
        try:
            return await self._predict(payload, deadline, observation or Observation("Predict"))
        finally:
            self.held -= 1

    def admit(self, seconds: float) -> None:
        """Refuses a Predict call before it is read, if even the smallest call with ``seconds`` left would be refused.

        Raises:
          StatusError: RESOURCE_EXHAUSTED, there are too many calls; UNAVAILABLE, they would wait too long.
        """
        self._check_number()
        self._scheduler.admit(seconds)

    def _check_number(self) -> None:
        if self.held >= self._max_calls:
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")

    async def _predict(self, payload: bytes, deadline: float, seen: Observation) -> predict_pb2.PredictResponse:
        _count_inputs(payload)
        large, loop = len(payload) > _LARGE, asyncio.get_running_loop()
        if large:
            request = await loop.run_in_executor(self._reader, parse, predict_pb2.PredictRequest, payload)
        else:
            request = parse(predict_pb2.PredictRequest, payload)
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        seen.model, seen.signature = request.model_spec.name, request.model_spec.signature_name or DEFAULT_SIGNATURE
        with self._models.use(request.model_spec) as servable:
            seen.servable, seen.version = servable, servable.version
            signature = servable.signature(seen.signature)
            arguments = (request.inputs, request.output_filter, self._limits)
            if large:
                feeds = await loop.run_in_executor(self._reader, signature.read, *arguments)
            else:
                feeds = signature.read(*arguments)
            call = Call(signature, feeds, deadline)
            call.future = loop.create_future()
            if large or call.rows > _MANY:
                self.large = time.monotonic()
            self._scheduler.submit(call)
            try:
                outputs = await call.future
            finally:
                # Also if the client has gone: then nobody waits for the scores.
                self._scheduler.drop(call)
                seen.waited = (call.started or time.monotonic()) - call.arrived
            seen.rows = call.rows
            seen.inputs, seen.outputs = dict(zip(signature.order, feeds.arrays, strict=True)), outputs
            response = predict_pb2.PredictResponse()
            response.model_spec.name = servable.name
            response.model_spec.version.value = servable.version
            response.model_spec.signature_name = seen.signature
            for alias, array in outputs.items():
                tensors.encode(array, response.outputs[alias], self._as_content)
            return response

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

    async def handle_reload_config_request(
        self, request: model_management_pb2.ReloadConfigRequest
    ) -> model_management_pb2.ReloadConfigResponse:
        # This takes as long as the models take to load.
        await asyncio.get_running_loop().run_in_executor(None, self._models.reload, request.config)
        return model_management_pb2.ReloadConfigResponse()


def unimplemented(method: str, request: Message) -> Message:
    del request
    raise StatusError(
        grpc.StatusCode.UNIMPLEMENTED,
        f"{method} answers one task only and is not offered; Predict answers all tasks by name",
    )


def parse(request_class: type[_M], payload: bytes) -> _M:
    """Parses a message; raises StatusError INTERNAL if the bytes are not one."""
    try:
        return request_class.FromString(payload)
    except DecodeError:
        name = request_class.DESCRIPTOR.full_name
        raise StatusError(grpc.StatusCode.INTERNAL, f"the request is not a {name}") from None


def _count_inputs(payload: bytes) -> None:
    """Refuses a request with very many fields before it is parsed: a field costs thousands of times its bytes.

    Raises:
      StatusError: it has more fields than any model.
    """
    if len(payload) < 2 * _MAX_FIELDS:
        return  # a field is two bytes at least
    place, fields = 0, 0
    while place < len(payload):
        tag, place = _varint(payload, place)
        size, place = _varint(payload, place)
        if tag & 7 != 2:  # every field of a PredictRequest has a length; the parser refuses anything else
            return
        place += size
        fields += 1
        if fields > _MAX_FIELDS:
            raise invalid_argument(f"the request has more than {_MAX_FIELDS} inputs and outputs")


def _varint(payload: bytes, place: int) -> tuple[int, int]:
    """Reads the number at ``place``; returns it and the next place, or 0 and the end if the bytes end."""
    number = shift = 0
    while place < len(payload) and shift < 64:
        byte = payload[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
    return 0, len(payload)
