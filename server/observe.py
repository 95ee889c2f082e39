"""What is counted: every request in the outermost layer, which turns what nobody handled into a 500 without a
traceback, and every answer on its way out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragkv.server.errors import respond
from ragkv.server.metrics import Metrics
from ragkv.types import DoneEvent, Event, TokenEvent


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
            await respond(scope, error)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, scope["method"], str(status or 499)).inc()


async def observed(events: AsyncIterator[Event], metrics: Metrics, tenant: str) -> AsyncGenerator[Event, None]:
    """``events``, with the times between tokens, and in the end the answer, counted. Closing it closes them."""
    last: float | None = None
    try:
        async for event in events:
            if isinstance(event, TokenEvent):
                now = perf_counter()
                if last is not None:
                    metrics.tbt.labels(tenant).observe(now - last)
                last = now
            elif isinstance(event, DoneEvent):
                metrics.observe(event.answer, tenant)
            yield event
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
