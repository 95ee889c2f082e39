"""An answer's events: as a server-sent event stream, or only the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ragkv.errors import CancelledError, EngineClosedError, RagkvError
from ragkv.server.errors import error_body, logger
from ragkv.server.hangup import unless_hung_up
from ragkv.sse import COMMENT, encode
from ragkv.types import Answer, DoneEvent, Event

KEEP_ALIVE_SECONDS = 15.0


class Voice(Protocol):
    """How events are put into bytes."""

    def say(self, event: Event) -> bytes: ...
    def fail(self, error: Exception) -> bytes: ...


class NamedEvents:
    """Events under their names, as ``POST /v1/query`` streams them."""

    def say(self, event: Event) -> bytes:
        return encode(event.type, event.model_dump_json())

    def fail(self, error: Exception) -> bytes:
        return encode("error", error_body(error).decode())


async def answer_of(events: AsyncGenerator[Event, None]) -> Answer:
    """The answer at their end."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, DoneEvent):
                return event.answer
    raise CancelledError("the request ended without an answer")


class EventStream(Response):
    """Sends ``events`` as they come, in a ``voice``; closes them, in the task that ran them, when the client hangs up.

    The first event is awaited before the response starts, so that what is wrong with the request becomes an
    ordinary HTTP error. A later failure is said last. Comments keep silent connections open.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event, None], voice: Voice) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._voice = voice
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
            await self._fail(send, error)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, send: Send) -> None:
        try:
            first = await anext(self._events)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_all(send, first)
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send, first: Event) -> None:
        beat = asyncio.create_task(_keep_alive(send))
        try:
            await _send_piece(send, self._voice.say(first))
            async for event in self._events:
                await _send_piece(send, self._voice.say(event))
        except Exception as error:
            await self._fail(send, error)
        finally:
            beat.cancel()
            with suppress(asyncio.CancelledError):
                await beat

    async def _fail(self, send: Send, error: Exception) -> None:
        if not isinstance(error, RagkvError):
            logger.error("a stream failed after it had started", exc_info=error)
        await _send_piece(send, self._voice.fail(error))


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _keep_alive(send: Send) -> None:
    while True:
        await asyncio.sleep(KEEP_ALIVE_SECONDS)
        await _send_piece(send, COMMENT)
