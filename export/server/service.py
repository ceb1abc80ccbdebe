"""The gRPC services in front of the versions: PredictionService, ModelService, health, reflection."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import predict_pb2

from export.server.access_log import request_id
from export.server.answers import Answers, parse, unimplemented
from export.server.api import HEALTH_SERVICES, PREDICTION_SERVICE, SERVICES, describe_services
from export.server.batching import Call, Result, Scheduler
from export.server.limits import Limits
from export.server.models import Models
from export.server.observation import Observation
from export.server.servable import free_memory
from export.server.status import STOPPING, StatusError

_LIMITS = Limits()
_GRPC_LOGGER = "grpc._cython.cygrpc"
_FRONTS = 4
_MAX_STREAMS = 128  # calls of one connection at once; the client's gRPC holds back further ones
_MAX_READING = 4096  # calls without a body at once; beyond this number the oldest end
_CONNECTION_SECONDS = 3600
_QUIET_SECONDS = 0.05
_HOLD_SECONDS = 0.5
_LARGE_SECONDS = 5.0

_T = TypeVar("_T")


class Server:
    """A gRPC server over ``models``, with an event loop in a thread of its own.

    It listens from :meth:`listen` on, and health says NOT_SERVING until :meth:`serving` is called.

    Args:
      models: what is served.
      threads: how many run TensorFlow at once.
      limits: of a request.
      max_calls: Predict calls at once, running and waiting; further ones get RESOURCE_EXHAUSTED.
      max_message_bytes: of a request, compressed or not.
      max_batch_rows: rows that run together; larger calls are cut.
      max_wait_seconds: a Predict call that is expected to wait longer gets UNAVAILABLE.
      read_seconds: the time in which a client must send a request's body.
      as_content: answer with ``tensor_content`` in place of the `*_val` fields.
      observe: called in the event loop after every answered Predict call.
      observe_batch: called with the rows of every run of a model, in the threads that run them.
      credentials: makes the credentials for TLS.
      interceptors: gRPC interceptors of every call.
    """

    def __init__(
        self,
        models: Models,
        *,
        threads: int,
        limits: Limits = _LIMITS,
        max_calls: int = 1024,
        max_message_bytes: int = 32 << 20,
        max_batch_rows: int = 2048,
        max_wait_seconds: float = 1.0,
        read_seconds: float = 10.0,
        as_content: bool = False,
        observe: Callable[[Observation], None] | None = None,
        observe_batch: Callable[[int], None] = lambda rows: None,
        credentials: Callable[[], grpc.ServerCredentials] | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        logging.getLogger(_GRPC_LOGGER).addFilter(_is_news)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        self._scheduler = Scheduler(
            threads, max_rows=max_batch_rows, max_wait=max_wait_seconds, deliver=self._deliver, observe=observe_batch
        )
        self.answers = Answers(models, limits, self._scheduler, max_calls=max_calls, as_content=as_content)
        self._read_seconds, self._observe = read_seconds, observe
        self._credentials, self._interceptors = credentials, interceptors
        self._max_message_bytes = max_message_bytes
        self._is_serving = False
        self._claim: socket.socket | None = None
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._stopping = False
        self._held_back: asyncio.Event | None = None
        self._arrived = 0.0
        self.run(self._make())

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine in the server's event loop and returns its result; called from other threads."""
        return self.submit(coroutine).result()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> futures.Future[_T]:
        """Runs a coroutine in the server's event loop; called from other threads."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _make(self) -> None:
        self._health = health.aio.HealthServicer()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        describe_services()
        handlers = _Handlers(self._handlers())
        self._grpc = [self._front(handlers) for _ in range(_FRONTS)]
        self._sweeper = asyncio.create_task(self._sweep())

    def _front(self, handlers: _Handlers) -> grpc.aio.Server:
        """Makes one of the servers that share the port.

        A gRPC server accepts a call only after it has accepted the one before. This takes two thread switches, which
        are slow when the cores are busy. With one server, calls under overload would wait there, uncounted, until their
        deadline.
        """
        front = grpc.aio.server(
            interceptors=self._interceptors,
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 1),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                # Connections end now and then, so that clients find new replicas and leaks are freed.
                ("grpc.max_connection_age_ms", _CONNECTION_SECONDS * 1000),
                ("grpc.max_connection_age_grace_ms", 60_000),
                # Connections whose other end has gone without a word.
                ("grpc.keepalive_time_ms", 120_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        front.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, front)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], front)
        return front

    def listen(self, host: str, port: int) -> int:
        """Answers calls from now on; returns the port.

        Args:
          host: an address of this machine or its name.
          port: 0 is any free one.

        Raises:
          OSError: the port is taken, or the address is not of this machine.
        """

        async def start() -> int:
            found = port
            for front in self._grpc:
                address = f"[{host}]:{found}" if ":" in host else f"{host}:{found}"
                if self._credentials is None:
                    found = front.add_insecure_port(address)
                else:
                    found = front.add_secure_port(address, self._credentials())
            for front in self._grpc:
                await front.start()
            return found

        if port:
            self._claim = claim(host, port)
        reserve(host, port)
        return self.run(start())

    def serving(self) -> None:
        """Makes health say SERVING from now on."""
        if not self._is_serving:  # watchers are told only about changes
            self._is_serving = True
            self.run(self._set_health(health_pb2.HealthCheckResponse.SERVING))

    def drain(self, grace_seconds: float) -> bool:
        """Makes health say NOT_SERVING and Predict UNAVAILABLE, and waits for running calls; False if some did not end.

        The process should end after this, and its connections with it. Clients see that as UNAVAILABLE too and try
        another server. Closing the port first, as :meth:`close` does, would cancel calls that arrive meanwhile.
        """
        return self.run(self._drain(grace_seconds))

    async def _drain(self, grace_seconds: float) -> bool:
        await self._health.enter_graceful_shutdown()
        self._stopping = True
        end = time.monotonic() + grace_seconds
        while self.answers.held and time.monotonic() < end:
            await asyncio.sleep(0.01)
        drained = not self.answers.held
        # A client that gets UNAVAILABLE may call again at once. So calls are held until no more come, and answered
        # together at the end: then no client waits for an answer when the connections end.
        self._held_back, self._arrived = asyncio.Event(), time.monotonic()
        limit = time.monotonic() + _HOLD_SECONDS
        while time.monotonic() < min(limit, self._arrived + _QUIET_SECONDS):
            await asyncio.sleep(0.01)
        self._held_back.set()
        self._held_back = asyncio.Event()
        await asyncio.sleep(_QUIET_SECONDS)
        return drained

    def close(self) -> None:
        """Closes the port and cancels running calls."""

        async def stop() -> None:
            self._sweeper.cancel()
            await asyncio.gather(*(front.stop(None) for front in self._grpc))

        self.run(stop())
        if self._claim is not None:
            self._claim.close()
        self._scheduler.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in HEALTH_SERVICES:
            await self._health.set(service, status)

    def _deliver(self, done: Sequence[tuple[Call, Result]]) -> None:
        """Passes results from the scheduler's threads to the coroutines that wait for them."""

        def resolve() -> None:
            for call, result in done:
                future = call.future
                if future is None or future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(resolve)

    async def _sweep(self) -> None:
        """Ends calls whose body does not arrive, because they hold memory; returns the memory of large calls.

        Otherwise the process would keep as much free memory as it ever used at once.
        """
        while True:
            await asyncio.sleep(min(1.0, self._read_seconds / 4))
            if self.answers.large is not None and time.monotonic() - self.answers.large > _LARGE_SECONDS:
                self.answers.large = None
                await self._loop.run_in_executor(None, free_memory)
            oldest = time.monotonic() - self._read_seconds
            for task, begun in list(self._reading.items()):
                if begun > oldest and len(self._reading) <= _MAX_READING:
                    break  # the dict is in the order of arrival
                del self._reading[task]
                task.cancel()

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        answers = self.answers
        methods: dict[str, Callable[[Any], Any]] = {
            "GetModelMetadata": answers.get_model_metadata,
            "GetModelStatus": answers.get_model_status,
            "HandleReloadConfigRequest": answers.handle_reload_config_request,
        }
        handlers = {}
        for service, methods_of in SERVICES.items():
            for name, method in methods_of.items():
                answer = methods.get(name, functools.partial(unimplemented, name))
                handlers[f"/{service}/{name}"] = self._handler(_parsed(answer, method.request))
        handlers[f"/{PREDICTION_SERVICE}/Predict"] = self._handler(self._predict, self._admit)
        return handlers

    def _handler(
        self,
        answer: Callable[[bytes, Any], Awaitable[Message]],
        admit: Callable[[grpc.aio.ServicerContext], None] = lambda context: None,
    ) -> grpc.RpcMethodHandler:
        """A handler of a stream of requests that uses the first one: then the time to read it can be limited."""

        async def behave(requests: Any, context: grpc.aio.ServicerContext) -> bytes:
            del requests
            try:
                admit(context)
                return (await answer(await self._read(context), context)).SerializeToString()
            except StatusError as error:
                code, text = error.code, error.text
            except grpc.aio.InternalError:
                raise  # the client has gone, or its deadline has passed
            except Exception:
                # A bug in our code: the operator gets the traceback, the client a status, and the server goes on.
                traceback.print_exc()
                code, text = grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
            # Does what context.abort does, a tenth cheaper: under overload a server mostly refuses.
            context.set_code(code)
            context.set_details(text)
            return b""

        return grpc.stream_unary_rpc_method_handler(behave)

    async def _read(self, context: grpc.aio.ServicerContext) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        self._reading[task] = time.monotonic()
        try:
            payload = await context.read()
        except asyncio.CancelledError:
            if task in self._reading:  # the client has gone; otherwise the server cancelled it
                raise
            raise StatusError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no request came within {self._read_seconds:g} s"
            ) from None
        finally:
            self._reading.pop(task, None)
        if payload is grpc.aio.EOF:
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "the call holds no request, or one over a limit")
        return payload

    def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Refuses a Predict call before it is read, because reading is most of the cost of a refusal."""
        left = context.time_remaining()
        try:
            self.answers.admit(math.inf if left is None else left)
        except StatusError as error:
            if self._observe is not None:
                seen = _observation(context)
                seen.code, seen.text = error.code, error.text
                self._observe(seen)
            raise

    async def _predict(self, payload: bytes, context: grpc.aio.ServicerContext) -> Message:
        if self._observe is None:
            return await self._score(payload, context)
        begun = time.monotonic()
        seen = _observation(context)
        seen.request_bytes = len(payload)
        context.set_trailing_metadata((("x-request-id", seen.request_id),))
        try:
            response = await self._score(payload, context, seen)
            seen.response_bytes = response.ByteSize()
            return response
        except StatusError as error:
            seen.code, seen.text = error.code, error.text
            raise
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            seen.code = grpc.StatusCode.CANCELLED if cancelled else grpc.StatusCode.INTERNAL
            raise
        finally:
            seen.seconds = time.monotonic() - begun
            self._observe(seen)

    async def _score(
        self, payload: bytes, context: grpc.aio.ServicerContext, seen: Observation | None = None
    ) -> predict_pb2.PredictResponse:
        if self._stopping:
            self._arrived = time.monotonic()
            if self._held_back is not None:
                await self._held_back.wait()
            raise StatusError(grpc.StatusCode.UNAVAILABLE, STOPPING)
        left = context.time_remaining()
        deadline = math.inf if left is None else time.monotonic() + left
        return await self.answers.predict(payload, deadline, seen)


def _observation(context: grpc.aio.ServicerContext) -> Observation:
    """An observation of a Predict call before it is read."""
    given = dict(context.invocation_metadata() or ()).get("x-request-id")
    return Observation("Predict", peer=context.peer(), request_id=request_id(given))


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _parsed(
    answer: Callable[[Any], Any], request_class: type[Message]
) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Message]]:
    """Turns ``answer`` of a message, plain or a coroutine, into one of bytes."""

    async def behave(payload: bytes, context: grpc.aio.ServicerContext) -> Message:
        del context
        response = answer(parse(request_class, payload))
        return await response if inspect.isawaitable(response) else response

    return behave


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to report it. Answers that cannot be sent are normal: clients leave, and deadlines pass."""
    return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def claim(host: str, port: int) -> socket.socket:
    """Reserves a port against other processes of this program while the socket is open.

    Two processes that start at the same time would both find the port free and listen on it, because the servers of one
    process share their port. The name of a socket exists only once, and it ends with the process.

    Raises:
      OSError: another process has it.
    """
    *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0stem-serve {address[0]}:{port}")
    except OSError:
        name.close()
        raise
    return name


def reserve(host: str, port: int) -> None:
    """Checks that a port is free. The servers that share it would also share it with another process.

    Raises:
      OSError: the port is taken, or the address is not of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
