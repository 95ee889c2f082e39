"""From chunks to entries in the store: computed on the engine thread, written on threads that may wait for the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import EncodeGroup
from ragkv.encode import EncodedChunk
from ragkv.errors import EngineClosedError, RagkvError
from ragkv.loop import EngineLoop
from ragkv.store import ChunkStore

log = logging.getLogger("ragkv")
_IN_FLIGHT = 8


class Writer:
    """Computes and stores chunk entries: groups go to the engine thread, results to a thread that writes."""

    def __init__(self, checkpoint: Checkpoint, loop: EngineLoop, store: ChunkStore, codec: str) -> None:
        self._shape, self._codec = checkpoint.runner.shape, codec
        self._loop, self._store = loop, store
        self._model = checkpoint.model_fingerprint
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="ragkv-writer")

    def submit(self, group: EncodeGroup, done: Callable[[int, Exception | None], None]) -> None:
        """Encode and store ``group``; ``done(bytes written, error)`` is called once, on some thread."""

        def encoded(result: list[EncodedChunk] | Exception) -> None:
            if isinstance(result, Exception):
                done(0, result)
                return
            try:
                self._threads.submit(self._store_all, result, done)
            except RuntimeError:
                done(0, EngineClosedError("the engine was closed before the chunks were stored"))

        self._loop.submit_encode(group, encoded)

    def close(self) -> None:
        self._threads.shutdown()

    def _store_all(self, chunks: list[EncodedChunk], done: Callable[[int, Exception | None], None]) -> None:
        written = 0
        try:
            for chunk in chunks:
                stored = self._store.put(
                    chunk.key,
                    self._shape.geometry,
                    chunk.slabs,
                    tokens=chunk.tokens,
                    model=self._model,
                    codec=self._codec,
                    context_tokens=chunk.context_tokens,
                    context_policy=chunk.context_policy,
                )
                written += self._shape.entry_bytes(chunk.tokens, self._codec) if stored else 0
        except Exception as error:  # reported to whoever waits
            done(written, error)
        else:
            done(written, None)


class Encoding:
    """One ingest's encoding: keeps a few groups in flight, counts, and remembers why it stopped."""

    def __init__(self, writer: Writer, progress: Callable[[int], None]) -> None:
        self._writer, self._progress = writer, progress
        self._slots = threading.Semaphore(_IN_FLIGHT)
        self._lock = threading.Lock()
        self.encoded = self.bytes_written = self.given_up = 0
        self.error: Exception | None = None

    def add(self, group: EncodeGroup) -> None:
        """Encode ``group``, waiting while enough is in flight; after an error only counts it as given up."""
        self._slots.acquire()
        if self.error:
            self.given_up += group.wanted
            self._slots.release()
            return
        try:
            self._writer.submit(group, lambda written, error: self._done(group, written, error))
        except RagkvError as error:
            self._done(group, 0, error)

    def wait(self) -> None:
        """Until nothing is in flight."""
        for _ in range(_IN_FLIGHT):
            self._slots.acquire()

    def _done(self, group: EncodeGroup, written: int, error: Exception | None) -> None:
        with self._lock:
            self.bytes_written += written
            if error:
                self.error = self.error or error
                self.given_up += group.wanted
            else:
                self.encoded += group.wanted
            done = self.encoded
        self._slots.release()
        self._progress(done)
