"""What operators may turn on: metrics, the access log, TLS, tokens, HTTP. All of it is off by default."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import traceback
from collections.abc import Callable

import grpc
from tensorflow_serving.apis import predict_pb2

from export.server.access_log import AccessLog
from export.server.metrics import Metrics
from export.server.models import Models
from export.server.monitoring import CONNECTIONS as MONITORING_CONNECTIONS
from export.server.monitoring import monitoring
from export.server.observation import Observation
from export.server.options import Options
from export.server.rest import CONNECTIONS as REST_CONNECTIONS
from export.server.rest import Backend, Rest
from export.server.security import Certificates, TokenInterceptor, Tokens
from export.server.service import Server
from export.server.status import STOPPING, StatusError
from export.server.web import Handler, Web
from stem_util.errors import UserError


class Operating:
    """Opens what ``options`` turn on.

    Args:
      options: of the command line.
      models: that are served.
      report: called with a line for the operator.

    Attributes:
      ready: to be set while a model serves and the server is not stopping.
      metrics: None if they are off.
      metrics_port, rest_port: the open ports.
      credentials: makes the credentials of a gRPC server; None without TLS.
      interceptors: of gRPC.

    Raises:
      UserError: a file is not what it should be, or a port is taken.
    """

    def __init__(self, options: Options, models: Models, report: Callable[[str], None]) -> None:
        self._options, self._models = options, models
        self.ready = False
        self.metrics_port = self.rest_port = 0
        self._rest: Rest | None = None
        self._certificates = _certificates(options, report)
        self._tokens = None if options.token_file is None else Tokens(options.token_file, report)
        if self._tokens is not None and self._certificates is None and not _is_loopback(options.host):
            report(f"tokens cross the network to {options.host} in clear text: give --tls_certificate and --tls_key")
        self._log = None if options.access_log is None else AccessLog(options.access_log, report)
        self.metrics = None if options.metrics_port is None else Metrics(models.loaded, options.metrics_sample)
        self._web = None if options.metrics_port is None and options.rest_port is None else Web()
        self.credentials = None if self._certificates is None else self._certificates.grpc_credentials
        self.interceptors = [] if self._tokens is None else [TokenInterceptor(self._tokens, self.observe)]
        if self.metrics is not None:
            answer = monitoring(self.metrics, lambda: self.ready)
            self.metrics_port = self._listen(answer, options.metrics_port, "metrics_port", MONITORING_CONNECTIONS, None)

    @property
    def observes(self) -> bool:
        """Whether calls are counted or logged."""
        return self._log is not None or self.metrics is not None

    def observe(self, seen: Observation) -> None:
        """Counts and logs an answered call. Does not block and raises nothing; any thread may call it."""
        try:
            if self.metrics is not None:
                self.metrics.observe(seen)
            if self._log is not None:
                self._log.observe(seen)
        except Exception:
            traceback.print_exc()

    def observe_batch(self, rows: int) -> None:
        """Counts a run of a model; called in the threads that run them."""
        if self.metrics is not None:
            self.metrics.observe_batch(rows)

    def loading(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which a version of the model ``name`` is loaded: counts failures."""
        return contextlib.nullcontext() if self.metrics is None else self.metrics.loading(name)

    def listen(self, server: Server) -> None:
        """Answers REST calls through ``server`` from now on, if REST is on.

        Raises:
          UserError: the port is taken.
        """
        if self._options.rest_port is None:
            return
        answers = server.answers

        async def predict(payload: bytes, deadline: float, seen: Observation) -> predict_pb2.PredictResponse:
            call = answers.predict(payload, deadline, seen)
            try:
                future = server.submit(call)
            except RuntimeError:  # its event loop has ended
                call.close()
                raise StatusError(grpc.StatusCode.UNAVAILABLE, STOPPING) from None
            return await asyncio.wrap_future(future)

        backend = Backend(
            self._models, predict, answers.get_model_status, answers.get_model_metadata, lambda: not self.ready
        )
        self._rest = Rest(
            backend,
            timeout_seconds=self._options.rest_seconds,
            max_body_bytes=self._options.rest_max_bytes,
            tokens=self._tokens,
            observe=self.observe if self.observes else None,
        )
        self.rest_port = self._listen(
            self._rest.handler, self._options.rest_port, "rest_api_port", REST_CONNECTIONS, self._certificates
        )

    def close(self, seconds: float) -> None:
        """Closes the ports and writes the rest of the log; running HTTP requests have ``seconds`` to end."""
        if self._web is not None:
            self._web.close(seconds)
        if self._rest is not None:
            self._rest.close()
        if self._log is not None:
            self._log.close(1)

    def _listen(
        self, handler: Handler, port: int | None, flag: str, connections: int, certificates: Certificates | None
    ) -> int:
        assert self._web is not None and port is not None
        host = self._options.host
        try:
            return self._web.listen(handler, host, port, connections=connections, certificates=certificates)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}, --{flag}: {error.strerror}") from error


def _certificates(options: Options, report: Callable[[str], None]) -> Certificates | None:
    if options.tls_certificate is not None and options.tls_key is not None:
        return Certificates(options.tls_certificate, options.tls_key, options.tls_client_ca, report)
    if options.tls_certificate or options.tls_key or options.tls_client_ca:
        raise UserError("TLS needs both --tls_certificate and --tls_key (--tls_client_ca is an addition to them)")
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
