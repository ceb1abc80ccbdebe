"""HTTP in a separate event loop and thread, with limits against hostile clients.

A connection has some seconds for a request's headers, and the body has a deadline too. If there are more connections
than allowed, the one whose client has been silent for longest is closed. So slow clients occupy no thread, and
descriptors only for a short time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from export.server.security import Certificates

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]
T = TypeVar("T")

SOFTWARE = "stem-serve"
"""The header Server; aiohttp's own tells strangers the versions of everything."""

_IDLE_SECONDS = 15.0  # for the headers of a request, and for reading an answer
_HANDSHAKE_SECONDS = 10.0
_LOGGER = logging.getLogger("export.server.web")
_LOGGER.disabled = True  # aiohttp logs each malformed request with a traceback


class Web:
    """Listens on ports and answers in one thread.

    Raises:
      OSError: from :meth:`listen`: the port is taken, or the address is not of this machine.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._listeners: list[_Listener] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="web", daemon=True)
        self._thread.start()

    def listen(
        self, handler: Handler, host: str, port: int, *, connections: int, certificates: Certificates | None = None
    ) -> int:
        """Answers on a port (0: any free one) and returns it.

        Args:
          handler: called for each request; an exception gives the client a 500 and stderr the traceback.
          connections: how many at once.
          certificates: for https.
        """
        listener = _Listener(handler, connections, certificates)
        self._run(listener.start(host, port))
        self._listeners.append(listener)
        return listener.port

    def close(self, seconds: float) -> None:
        """Closes the ports; running requests have ``seconds`` to end."""
        for listener in self._listeners:
            self._run(listener.close(seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class _Connection:
    """When an idle connection is closed; ``request`` is the one that is being answered."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.request: web.BaseRequest | None = None

    @property
    def waits(self) -> bool:
        """Whether the server waits for the client."""
        return self.request is None or not self.request.content.is_eof()


class _Listener:
    def __init__(self, handler: Handler, connections: int, certificates: Certificates | None) -> None:
        self._handler, self._limit, self._certificates = handler, connections, certificates
        self.port = 0
        self._connections: dict[asyncio.Protocol, _Connection] = {}

    async def start(self, host: str, port: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._web = web.Server(
            self._answer, access_log=None, logger=_LOGGER, keepalive_timeout=_IDLE_SECONDS, lingering_time=1.0
        )
        infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
        except OSError:
            self._socket.close()
            raise
        self.port = self._socket.getsockname()[1]
        self._server = await self._open()
        self._sweeping = asyncio.create_task(self._sweep())

    async def close(self, seconds: float) -> None:
        self._sweeping.cancel()
        self._server.close()
        self._socket.close()
        await self._web.shutdown(seconds)

    async def _open(self) -> asyncio.Server:
        self._context = None if self._certificates is None else self._certificates.context
        return await self._loop.create_server(
            self._protocol,
            sock=self._socket.dup(),
            ssl=self._context,
            backlog=512,
            ssl_handshake_timeout=None if self._context is None else _HANDSHAKE_SECONDS,
        )

    def _protocol(self) -> asyncio.Protocol:
        if len(self._web.connections) >= self._limit:
            waiting = [x for x in self._web.connections if self._connections[x].waits]
            if not waiting:
                return _Refusal()
            _abort(min(waiting, key=lambda x: self._connections[x].deadline))
        protocol: asyncio.Protocol = self._web()
        self._connections[protocol] = _Connection(self._loop.time() + _IDLE_SECONDS)
        return protocol

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            now = self._loop.time()
            for protocol, connection in list(self._connections.items()):
                if connection.request is None and connection.deadline < now:
                    _abort(protocol)
                    if protocol not in self._web.connections:
                        del self._connections[protocol]
            if self._certificates is not None:
                self._certificates.refresh()
                if self._certificates.context is not self._context:
                    # A second server on the same socket takes over; connections of the first one stay.
                    before, self._server = self._server, await self._open()
                    before.close()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        connection = self._connections[request.protocol]
        connection.request, connection.deadline = request, self._loop.time() + _IDLE_SECONDS
        try:
            return await self._handler(request)
        except web.HTTPException:
            raise
        except Exception:
            # A bug in our code: the operator gets the traceback, the client a status, and the server goes on.
            traceback.print_exc()
            return web.Response(
                status=500, text="internal error; the server's log has the details\n", headers={"Server": SOFTWARE}
            )
        finally:
            connection.request, connection.deadline = None, self._loop.time() + _IDLE_SECONDS


def _abort(protocol: asyncio.Protocol) -> None:
    transport = getattr(protocol, "transport", None)
    if transport is not None:
        transport.abort()


class BodyError(Exception):
    """A request's body was refused; the message says why.

    Attributes:
      status: the HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


async def read_body(
    request: web.BaseRequest, limit: int, seconds: float, take: Callable[[int], None] = lambda size: None
) -> bytes:
    """Reads the body, decompressed.

    Args:
      take: called with the size of each part; raises if there is no room for it.

    Raises:
      BodyError: it is larger than ``limit`` bytes, takes longer than ``seconds``, or is not what its headers say.
    """
    if (request.content_length or 0) > limit:
        raise BodyError(413, f"the body is larger than {limit} bytes")
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while chunk := await request.content.readany():
                take(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise BodyError(413, f"the body is larger than {limit} bytes")
    except TimeoutError:
        raise BodyError(408, f"the body did not come within {seconds:g} s") from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise BodyError(400, f"the body cannot be read: {' '.join(str(error).split())[:200]}") from None
    return bytes(body)
