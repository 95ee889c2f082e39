"""Work that stops when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from ragkv.errors import CancelledError, EngineClosedError

T = TypeVar("T")


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, run in one task of its own; cancelled, and waited for, when the client
    disconnects.

    Call it after the request's body has been read. Raises CancelledError (ours, not asyncio's) on a hang-up,
    EngineClosedError when the server stops before the work is done.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hang_up(receive))
    stopping = False
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("the client hung up before the answer was complete")
    except asyncio.CancelledError:
        stopping = True
        # Only the stopping server cancels a request; raised on, it would be logged as a crash.
        raise EngineClosedError(
            "the server stopped before the answer was complete; ask again when it is back"
        ) from None
    finally:
        task.cancel()
        watch.cancel()
        if not stopping:  # the event loop is ending, and waits for both itself
            await asyncio.gather(task, watch, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
