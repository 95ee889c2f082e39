"""A query's events as a server-sent event stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ragkv.errors import CancelledError, EngineClosedError, RagkvError
from ragkv.server.errors import error_body, logger
from ragkv.server.hangup import unless_hung_up
from ragkv.sse import COMMENT, encode
from ragkv.types import Answer, DoneEvent, Event

KEEP_ALIVE_SECONDS = 15.0


class EventStream(Response):
    """Sends ``events`` as they come; closes them, in the task that ran them, when the client hangs up.

    The first event is awaited before the response starts, so that what is wrong with the request becomes an
    ordinary HTTP error. A later failure becomes a last event named ``error``. Comments keep silent
    connections open.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Event], observe: Callable[[Answer], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._observe = observe
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_hung_up(receive, self._run(send))
        except CancelledError:
            if not self._started:
                raise
        except EngineClosedError as error:
            if not self._started:
                raise
            await _send_piece(send, encode("error", _described(error)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, send: Send) -> None:
        try:
            first = await anext(self._events)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_all(send, first)
        finally:
            if isinstance(self._events, AsyncGenerator):
                await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send, first: Event) -> None:
        beat = asyncio.create_task(_keep_alive(send))
        try:
            await self._write(send, first)
            async for event in self._events:
                await self._write(send, event)
        except Exception as error:
            await _send_piece(send, encode("error", _described(error)))
        finally:
            beat.cancel()
            with suppress(asyncio.CancelledError):
                await beat

    async def _write(self, send: Send, event: Event) -> None:
        if isinstance(event, DoneEvent):
            self._observe(event.answer)
        await _send_piece(send, encode(event.type, event.model_dump_json()))


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _keep_alive(send: Send) -> None:
    while True:
        await asyncio.sleep(KEEP_ALIVE_SECONDS)
        await _send_piece(send, COMMENT)


def _described(error: Exception) -> str:
    if not isinstance(error, RagkvError):
        logger.error("a stream failed after it had started", exc_info=error)
    return error_body(error).decode()
