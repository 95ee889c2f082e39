"""The engine thread: the only thread that touches the model.

Each turn it advances the prefill in hand for a slice of time, then gives every running request one token, so
that a long prompt never stalls the others; after each prefill, and whenever there is none, it encodes chunks for
the store for such a slice. It waits for the disk only to open a prompt's entries and where the layer it needs next
is still being read; it never writes, tokenises, detokenises or talks to a client.

Seams: *which* request is next is decided in :meth:`EngineLoop._admit` (today first come, first served; a
scheduler takes its place); *where KV lies* is hidden in :class:`~ragkv.kv.RequestKV`; *how far* a prefill gets
before others have their turn is one constant here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from ragkv.chunks import EncodeGroup
from ragkv.controller import Controller
from ragkv.costs import Machine
from ragkv.device_tier import DeviceTier
from ragkv.encode import EncodedChunk, encode
from ragkv.errors import EngineClosedError, QueueFullError, RagkvError
from ragkv.generation import Generation
from ragkv.kv import RequestKV
from ragkv.plan import Span
from ragkv.prefill import Prefill, PrefillResult
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore
from ragkv.types import FinishReason

PREFILL_SLICE_S = 0.05
_IDLE_S = 0.5
log = logging.getLogger("ragkv")

OnEncoded = Callable[[list[EncodedChunk] | Exception], None]


@dataclass(eq=False)
class _Running:
    generation: Generation
    kv: RequestKV
    position: int
    token: int
    produced: int = 1


@dataclass
class _Encoding:
    steps: Generator[None, None, list[EncodedChunk]]
    on_encoded: OnEncoded


class EngineLoop:
    """Serves :class:`Generation` requests and encodes chunks, until closed.

    Args:
        on_missing: called with the spans of a prefill whose chunks the store lacks.
        controller: chooses for requests that name no method, from when ``measuring`` is through: it is advanced
            while there is nothing else to do.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: ChunkStore,
        *,
        max_running: int,
        max_queued: int,
        on_missing: Callable[[list[Span]], None],
        blending_off: str | None = None,
        controller: Controller | None = None,
        measuring: Generator[None, None, Machine] | None = None,
        device_tier: DeviceTier | None = None,
    ) -> None:
        self._runner, self._store = runner, store
        self._controller, self._measuring = controller, measuring
        self._device_tier = device_tier
        self._max_running, self._max_queued = max_running, max_queued
        self._on_missing = on_missing
        self.blending_off = blending_off
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._encodes: deque[tuple[EncodeGroup, OnEncoded]] = deque()
        self._running: list[_Running] = []
        self._prefill: tuple[Generation, Generator[None, None, PrefillResult]] | None = None
        self._encoding: _Encoding | None = None
        self._owes_encoding = False
        self._closed = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="ragkv-engine", daemon=True)
        self._thread.start()

    # Called from other threads.

    def submit(self, generation: Generation, accepted: Callable[[], None]) -> None:
        """Queue a request; ``accepted`` is called before anything of it is.

        Raises:
            QueueFullError: as many requests wait as are allowed to.
            EngineClosedError: the engine was closed or has failed.
        """
        with self._wake:
            self.refuse_when_closed()
            if len(self._waiting) >= self._max_queued:
                raise QueueFullError(
                    f"as many requests wait as are let in ({self._max_queued}); try again later",
                    limit=self._max_queued,
                )
            accepted()
            self._waiting.append(generation)
            self._wake.notify()

    def submit_encode(self, group: EncodeGroup, on_encoded: OnEncoded) -> None:
        """Queue chunks to encode; ``on_encoded`` is called on the engine thread and must not block."""
        with self._wake:
            self.refuse_when_closed()
            self._encodes.append((group, on_encoded))
            self._wake.notify()

    @property
    def running(self) -> int:
        return len(self._running) + (self._prefill is not None)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Stop after the current layer; requests in flight get an :class:`EngineClosedError`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def refuse_when_closed(self) -> None:
        """Raises EngineClosedError when nothing will be served any more."""
        if self._closed:
            raise EngineClosedError(self.failure or "the engine was closed")

    # On the engine thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        except BaseException as error:  # the thread must not die silently: health reports it
            log.exception("the engine thread failed")
            self.failure = f"the engine failed: {error!r}"
        finally:
            self._abort_all()

    def _wait(self) -> bool:
        with self._wake:
            while not self._closed and not self._has_work():
                self._wake.wait(_IDLE_S)
            return not self._closed

    def _has_work(self) -> bool:
        busy = self._waiting or self._running or self._prefill or self._encodes or self._encoding
        return bool(busy or self._measuring)

    def _turn(self) -> None:
        encoding = bool(self._encodes or self._encoding)
        if not (encoding and self._owes_encoding):
            self._admit()
        if self._prefill:
            self._advance_prefill()
            # A slice of encoding after each prefill: under steady load what is missing would never be stored.
            self._owes_encoding = self._prefill is None
        elif encoding:
            self._advance_encoding()
            self._owes_encoding = False
        elif not self._running:
            self._advance_measuring()
        for request in list(self._running):
            self._decode(request)

    def _admit(self) -> None:
        self._drop_cancelled()
        while self._prefill is None and self._waiting and len(self._running) < self._max_running:
            generation = self._waiting.popleft()
            generation.watch.lap("queue")
            prefill = Prefill(
                self._runner,
                self._store,
                generation.plan,
                strategy=generation.strategy,
                ratio=generation.ratio,
                seed=generation.seed,
                room=generation.max_tokens,
                watch=generation.watch,
                blending_off=self.blending_off,
                controller=None if generation.as_asked else self._controller,
                device_tier=self._device_tier,
            )
            self._prefill = generation, prefill.run()

    def _drop_cancelled(self) -> None:
        """At once, not when their turn comes: until then they would take the place of the living."""
        with self._wake:
            gone = [generation for generation in self._waiting if generation.cancelled]
            for generation in gone:
                self._waiting.remove(generation)
        for generation in gone:
            generation.watch.lap("queue")
            generation.on_finish("cancelled")

    def _advance_prefill(self) -> None:
        if self._prefill is None:
            return
        generation, steps = self._prefill
        deadline = time.perf_counter() + PREFILL_SLICE_S
        try:
            while not generation.cancelled:
                next(steps)
                if self._closed or (self._running and time.perf_counter() > deadline):
                    return
            self._prefill = None
            steps.close()
            generation.on_finish("cancelled")
            return
        except StopIteration as done:
            result = done.value
        except Exception as error:  # one request's failure must not take the others along
            self._prefill = None
            self._fail(generation, error)
            return
        self._prefill = None
        self._first_token(generation, result)

    def _first_token(self, generation: Generation, result: PrefillResult) -> None:
        try:
            token = generation.sampler(result.logits)
        except Exception as error:  # as above
            self._fail(generation, error)
            return
        self._runner.synchronize()
        generation.watch.lap("first_token")
        generation.ttft_ms = generation.watch.total_ms
        generation.outcomes, generation.forecast = result.outcomes, result.forecast
        request = _Running(generation, result.kv, len(generation.plan.ids), token)
        self._running.append(request)
        self._deliver(request)
        if result.to_encode:
            self._on_missing(result.to_encode)

    def _decode(self, request: _Running) -> None:
        generation = request.generation
        if generation.cancelled:
            self._finish(request, "cancelled")
            return
        try:
            logits = self._runner.decode(request.token, request.position, request.kv)
            request.token = generation.sampler(logits)
        except Exception as error:  # as above
            self._running.remove(request)
            self._fail(generation, error)
            return
        request.position += 1
        request.produced += 1
        self._deliver(request)

    def _deliver(self, request: _Running) -> None:
        generation = request.generation
        if request.token in generation.stop_ids:
            self._finish(request, "stop")
            return
        generation.on_token(request.token)
        if request.produced >= generation.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: _Running, reason: FinishReason) -> None:
        self._running.remove(request)
        request.generation.watch.lap("decode")
        request.generation.on_finish(reason)

    def _fail(self, generation: Generation, error: Exception) -> None:
        if not isinstance(error, RagkvError):
            log.error("request %s failed", generation.id, exc_info=error)
        # Its frames would keep the request's KV alive for as long as the caller keeps the error.
        generation.on_error(error.with_traceback(None))

    def _advance_encoding(self) -> None:
        if self._encoding is None:
            group, on_encoded = self._encodes.popleft()
            self._encoding = _Encoding(encode(self._runner, group), on_encoded)
        job = self._encoding
        deadline = time.perf_counter() + PREFILL_SLICE_S
        try:
            while True:
                next(job.steps)
                if self._closed or ((self._running or self._waiting) and time.perf_counter() > deadline):
                    return
        except StopIteration as done:
            self._encoding = None
            _tell(job.on_encoded, done.value)
        except Exception as error:  # as above
            self._encoding = None
            _tell(job.on_encoded, error)

    def _advance_measuring(self) -> None:
        if self._measuring is None or self._controller is None:
            return
        try:
            next(self._measuring)
        except StopIteration as done:
            self._controller.machine, self._measuring = done.value, None
        except Exception as error:  # as above; everything is done as asked then
            self._measuring = None
            log.warning(
                "the machine's speed could not be measured, so nothing is computed instead of loaded: %r", error
            )

    def _abort_all(self) -> None:
        with self._wake:
            self._closed = True
            waiting, encodes = list(self._waiting), list(self._encodes)
            self._waiting.clear()
            self._encodes.clear()
        why = self.failure or "the engine was closed while the request ran"
        if self._prefill:
            generation, steps = self._prefill
            steps.close()
            waiting.append(generation)
        for generation in [*waiting, *(request.generation for request in self._running)]:
            generation.on_error(EngineClosedError(why))  # one each: they are raised in different threads
        jobs = [on_encoded for _, on_encoded in encodes]
        if self._encoding:
            jobs.append(self._encoding.on_encoded)
        for on_encoded in jobs:
            _tell(on_encoded, EngineClosedError(why))
        self._running.clear()
        self._prefill = self._encoding = None


def _tell(on_encoded: OnEncoded, result: list[EncodedChunk] | Exception) -> None:
    try:
        on_encoded(result)
    except Exception:  # a caller's progress callback must not take the engine along
        log.exception("handing over encoded chunks failed")
