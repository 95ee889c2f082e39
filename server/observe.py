"""The outermost layer: counts every request, and turns what nobody handled into a 500 without a traceback."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragkv.server.errors import respond
from ragkv.server.metrics import Metrics


class Observe:
    """ASGI middleware. An error after the response has started cannot be answered: it goes on to the HTTP
    server, which logs it and closes the connection."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if status is not None:
                raise
            await respond(error)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, scope["method"], str(status or 499)).inc()
