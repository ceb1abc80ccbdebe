"""The HTTP ports under clients that are slow, hostile or many, and what the monitoring port answers."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web as aiohttp_web

from export.server.metrics import Metrics
from export.server.monitoring import monitoring
from export.server.security import Certificates
from export.server.web import BodyError, Web, read_body

PEM = Path(__file__).parents[2] / "stem_client"
CERTIFICATE, KEY = PEM / "localhost.certificate.pem", PEM / "localhost.key.pem"


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close(1)


@pytest.fixture(scope="module")
def ready() -> list[bool]:
    return []


@pytest.fixture(scope="module")
def watched(web: Web, ready: list[bool]) -> int:
    metrics = Metrics(lambda: {"ranker": [3]}, 0.0)
    return web.listen(monitoring(metrics, lambda: bool(ready)), "127.0.0.1", 0, connections=64)


def _get(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


def test_metrics_and_health(watched: int, ready: list[bool]) -> None:
    for path in ("/metrics", "/monitoring/prometheus/metrics"):
        status, kind, text = _get(watched, path)
        assert status == 200 and kind.startswith("text/plain; version=0.0.4")
        assert 'stem_serve_version{model="ranker"} 3.0' in text
    assert _get(watched, "/healthz")[::2] == (200, "ok\n")
    assert _get(watched, "/readyz")[0] == 503
    ready.append(True)
    assert _get(watched, "/readyz")[0] == 200
    assert _get(watched, "/")[0] == 404 and _get(watched, "/metrics", "POST")[0] == 405


def _closed(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    connection.settimeout(10)
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
    ],
    ids=["headers", "tls", "length", "smuggling", "zeros"],
)
def test_what_is_no_http_is_refused_and_prints_nothing(
    watched: int, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", watched)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        assert _closed(connection).startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert _get(watched, "/healthz")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_slow_clients_are_closed_and_hold_up_nobody(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.server.web._IDLE_SECONDS", 0.5)
    port = web.listen(_Reader().answer, "127.0.0.1", 0, connections=8)
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for connection in slow:
        connection.sendall(b"GET / HTTP/1.1\r\nX-")
    for _ in range(3):  # of more than allowed, the longest idle one goes
        assert _get(port, "/")[0] == 200
    begun = time.monotonic()
    for connection in slow:
        _closed(connection)
        connection.close()
    assert time.monotonic() - begun < 9


class _Reader:
    def __init__(self, seconds: float = 0.3) -> None:
        self._seconds = seconds

    async def answer(self, request: aiohttp_web.BaseRequest) -> aiohttp_web.Response:
        if request.path == "/bug":
            raise RuntimeError("a bug")
        try:
            return aiohttp_web.Response(text=str(len(await read_body(request, 1000, self._seconds))))
        except BodyError as error:
            return aiohttp_web.Response(status=error.status, text=str(error), headers={"Connection": "close"})


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"Content-Length: 1001\r\n\r\n", "413 Request Entity Too Large|larger than 1000 bytes"),
        (
            b"Transfer-Encoding: chunked\r\n\r\n" + (b"200\r\n" + b"x" * 512 + b"\r\n") * 3,
            "413 |larger than 1000 bytes",
        ),
        (b"Content-Length: 10\r\n\r\nabc", "408 |did not come within 0.3 s"),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "400 |"),
        (b"Content-Length: 3\r\nContent-Encoding: gzip\r\n\r\nabc", "400 |cannot be read"),
        (b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\nab", "100 Continue|"),
    ],
    ids=["long", "chunks", "slow", "no chunk", "no gzip", "expect"],
)
def test_bodies_have_a_size_and_a_deadline(web: Web, sent: bytes, answered: str) -> None:
    port = web.listen(_Reader().answer, "127.0.0.1", 0, connections=8)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + sent)
        received = _closed(connection).decode()
    status, words = answered.split("|")
    assert received.split(" ", 1)[1].startswith(status) and words in received


def test_a_bomb_counts_what_it_becomes(web: Web) -> None:
    port = web.listen(_Reader().answer, "127.0.0.1", 0, connections=8)
    bomb = gzip.compress(bytes(1 << 26))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.request("POST", "/", gzip.compress(bytes(900)), {"Content-Encoding": "gzip"})
        assert connection.getresponse().read() == b"900"
        connection.request("POST", "/", bomb[:900], {"Content-Encoding": "gzip"})
        assert connection.getresponse().status == 413


def test_a_bug_is_a_500_and_a_traceback(web: Web, capfd: pytest.CaptureFixture[str]) -> None:
    port = web.listen(_Reader().answer, "127.0.0.1", 0, connections=8)
    status, _, text = _get(port, "/bug")
    assert status == 500 and "a bug" not in text and "RuntimeError: a bug" in capfd.readouterr().err


def test_a_port_that_is_taken_is_an_error(web: Web, watched: int) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        web.listen(_Reader().answer, "127.0.0.1", watched, connections=8)


def test_https_and_its_renewal(web: Web) -> None:
    certificates = Certificates(CERTIFICATE, KEY, None, print)
    port = web.listen(_Reader().answer, "127.0.0.1", 0, connections=8, certificates=certificates)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))

    def get() -> int:
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=trusting)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().status

    assert get() == 200
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in _closed(connection)
    renewed = Certificates(CERTIFICATE, KEY, CERTIFICATE, print)  # from now on clients need one, too
    certificates.context = renewed.context
    end = time.monotonic() + 10
    with pytest.raises((ssl.SSLError, ConnectionError)):
        while time.monotonic() < end:
            assert get() == 200
            time.sleep(0.1)
    trusting.load_cert_chain(CERTIFICATE, KEY)
    assert get() == 200
