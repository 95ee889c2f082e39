"""Chunks encoded for the store, beside serving: one group after the other, in slices of time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

from ragkv.chunks import EncodeGroup
from ragkv.encode import EncodedChunk, encode
from ragkv.errors import EngineClosedError
from ragkv.runner import ModelRunner

SLICE_S = 0.05
log = logging.getLogger("ragkv")

OnEncoded = Callable[[list[EncodedChunk] | Exception], None]


@dataclass
class _Job:
    steps: Generator[None, None, list[EncodedChunk]]
    on_encoded: OnEncoded


class Encodings:
    """Groups that wait, and the one under way. Any thread may :meth:`put`; the rest is the engine thread's."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._waiting: deque[tuple[EncodeGroup, OnEncoded]] = deque()
        self._job: _Job | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting or self._job)

    def put(self, group: EncodeGroup, on_encoded: OnEncoded) -> None:
        """Queue chunks to encode; ``on_encoded`` is called on the engine thread and must not block."""
        self._waiting.append((group, on_encoded))

    def advance(self, interrupted: Callable[[float], bool]) -> None:
        """Go on with the first group until it is done or ``interrupted``, which is told the seconds of this slice."""
        if self._job is None:
            group, on_encoded = self._waiting.popleft()
            self._job = _Job(encode(self._runner, group), on_encoded)
        job, began = self._job, time.perf_counter()
        try:
            while True:
                next(job.steps)
                if interrupted(time.perf_counter() - began):
                    return
        except StopIteration as done:
            self._job = None
            _tell(job.on_encoded, done.value)
        except Exception as error:  # one group's failure must not take the engine along
            self._job = None
            log.error("encoding chunks failed", exc_info=error)
            # Its frames would keep the group's KV alive for as long as somebody keeps the error.
            _tell(job.on_encoded, error.with_traceback(None))

    def abort(self, why: str) -> None:
        """Tell all of them that they will not be encoded."""
        told = [on_encoded for _, on_encoded in self._waiting]
        if self._job is not None:
            told.append(self._job.on_encoded)
        self._waiting.clear()
        self._job = None
        for on_encoded in told:
            _tell(on_encoded, EngineClosedError(why))  # one each: they are raised in different threads


def _tell(on_encoded: OnEncoded, result: list[EncodedChunk] | Exception) -> None:
    try:
        on_encoded(result)
    except Exception:  # a caller's progress callback must not take the engine along
        log.exception("handing over encoded chunks failed")
