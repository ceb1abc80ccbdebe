"""The port for monitoring: metrics, liveness and readiness. It asks for no token."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from export.server.metrics import CONTENT_TYPE, Metrics
from export.server.web import SOFTWARE, Handler

CONNECTIONS = 64
PATHS = ("/metrics", "/monitoring/prometheus/metrics")  # the second one is TensorFlow Serving's


def monitoring(metrics: Metrics, ready: Callable[[], bool]) -> Handler:
    """Answers GET of ``/metrics``, ``/healthz`` and ``/readyz``.

    Args:
      ready: whether a model serves and the server is not stopping.
    """

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return _text(405, "GET only", Allow="GET, HEAD")
        if request.path in PATHS:
            return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE, "Server": SOFTWARE})
        if request.path == "/healthz":
            return _text(200, "ok")
        if request.path == "/readyz":
            return _text(200, "ok") if ready() else _text(503, "not ready")
        return _text(404, f"there are {', '.join(PATHS)}, /healthz and /readyz")

    return answer


def _text(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers={"Server": SOFTWARE} | headers)
