"""The port for those who watch: metrics, and whether the process lives and is ready. It asks for no token."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from export.server.metrics import CONTENT_TYPE, Metrics
from export.server.web import Handler

CONNECTIONS = 64
PATHS = ("/metrics", "/monitoring/prometheus/metrics")  # the second one is TensorFlow Serving's


def monitoring(metrics: Metrics, ready: Callable[[], bool]) -> Handler:
    """Answers GET of ``/metrics``, ``/healthz`` and ``/readyz``.

    Args:
      ready: whether a model serves and the server is not stopping.
    """

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="GET only\n", headers={"Allow": "GET, HEAD"})
        if request.path in PATHS:
            return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})
        if request.path == "/healthz":
            return web.Response(text="ok\n")
        if request.path == "/readyz":
            return web.Response(text="ok\n") if ready() else web.Response(status=503, text="not ready\n")
        return web.Response(status=404, text=f"there are {', '.join(PATHS)}, /healthz and /readyz\n")

    return answer
