"""The store's side of a remote tier: deadlines, the circuit breaker, write-back and promotion."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ragkv.errors import CorruptEntryError, MissingEntryError, RemoteError, StoreError, StoreFormatError
from ragkv.store.buffers import Array
from ragkv.store.header import EntryHeader, unpack_header
from ragkv.store.remote.breaker import Breaker, State
from ragkv.store.remote.tier import Bytes, RemoteTier
from ragkv.store.remote.writeback import WriteBack

KEYS_AT_ONCE = 256
QUEUE_BYTES = 1 << 30
PROMOTION_BYTES = 512 << 20
CLOSE_SECONDS = 5.0

T = TypeVar("T")
log = logging.getLogger("ragkv")


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """A snapshot. Counts are this store object's own; bytes are those of entry files.

    ``breaker`` is "closed" (in use), "open" (left alone after failures) or "half-open" (being probed).
    """

    name: str
    breaker: State
    errors: int
    corrupt: int
    bytes_in: int
    bytes_out: int
    promotions: int
    promotions_dropped: int
    writebacks: int
    writebacks_dropped: int
    writebacks_waiting_bytes: int
    deletes_failed: int


class Remote:
    """Asks a :class:`~ragkv.store.remote.tier.RemoteTier` for what is missing here, and tells it what is new.

    Args:
        timeout: seconds a caller waits at most for up to 256 keys to be looked up.
        transfer_timeout: seconds a reader waits at most for one slab.
        threads: slabs on their way at a time.
        file_of: the path of a local entry's file, for uploads.
        keep: stores an entry that was read to the end, False if it is there; None if nothing may be stored.
        queue_bytes: entries waiting for upload are at most this much; they wait by key alone.
        promotion_bytes: memory for entries on their way to ``keep``.
    """

    def __init__(
        self,
        tier: RemoteTier,
        *,
        timeout: float,
        transfer_timeout: float,
        file_of: Callable[[bytes], str],
        keep: Callable[[EntryHeader, Sequence[Array]], bool] | None,
        queue_bytes: int = QUEUE_BYTES,
        promotion_bytes: int = PROMOTION_BYTES,
        threads: int = 4,
        breaker: Breaker | None = None,
    ) -> None:
        self._tier, self._timeout, self._transfer_timeout = tier, timeout, transfer_timeout
        self._keep, self._promotion_bytes = keep, promotion_bytes
        self._breaker = breaker or Breaker()
        self._counts: Counter[str] = Counter()
        self._promoting = 0
        self._closed = False
        self._changed = threading.Condition()
        # Whoever waits and whoever does the work are different threads: no client library keeps to a deadline
        # while a server sends byte by byte.
        self.lane: Executor = ThreadPoolExecutor(threads, thread_name_prefix="ragkv-remote-lane")
        self._moving = ThreadPoolExecutor(threads, thread_name_prefix="ragkv-remote-move")
        self._asking = ThreadPoolExecutor(2, thread_name_prefix="ragkv-remote-ask")
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="ragkv-remote-promote")
        self._writes = WriteBack(tier, self._breaker, file_of=file_of, capacity=queue_bytes, count=self._count)

    # Reading

    def find(self, keys: Sequence[bytes]) -> dict[bytes, EntryHeader]:
        """The headers of those of ``keys`` that are there. Never raises: what cannot be asked for is missing."""
        found: dict[bytes, EntryHeader] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            some = keys[start : start + KEYS_AT_ONCE]
            try:
                heads = self._call("ask", self._asking, self._timeout, partial(self._heads, some))
            except RemoteError:
                break
            headers = [self._header(key, raw) for key, raw in zip(some, heads, strict=True) if raw is not None]
            found.update((header.key, header) for header in headers if header is not None)
        return found

    def fetch(self, header: EntryHeader, layer: int, buffer: Array) -> None:
        """One layer's bytes, not yet verified. After an error ``buffer`` may still be written to.

        Raises:
            MissingEntryError: the object has gone, or a part of it.
            RemoteError: it cannot be read, or not in time, or the breaker is open.
        """
        slab = header.slabs[layer]
        get = partial(self._tier.get, header.key, slab.offset, buffer.data)
        if not self._call("transfer", self._moving, self._transfer_timeout, get):
            self._writes.delete([header.key])  # nobody shall find what may be left of it
            raise MissingEntryError("the chunk has left the remote tier; encode it again", key=header.key.hex())
        self._count("bytes_in", slab.nbytes)

    def expel(self, key: bytes) -> None:
        """Count an object as corrupt, and have it deleted."""
        self._count("corrupt", 1)
        self._writes.delete([key])

    # Writing

    def add(self, key: bytes, nbytes: int) -> None:
        """Have a local entry uploaded in the background, unless too much is waiting already. Never blocks."""
        self._writes.add(key, nbytes)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete objects, next in turn; waits for it no longer than for an answer. Best effort."""
        done = self._writes.delete(keys)
        if self._breaker.closed:
            done.wait(self._timeout)

    def may_promote(self, header: EntryHeader) -> bool:
        """Reserve memory to keep an entry while it is read; give it back with :meth:`promote`."""
        if self._keep is None:
            return False
        with self._changed:
            fits = not self._closed and self._promoting + header.file_bytes <= self._promotion_bytes
            self._promoting += header.file_bytes if fits else 0
        self._count("promotions_dropped", not fits)
        return fits

    def promote(self, header: EntryHeader, slabs: Sequence[Array] | None) -> None:
        """Store an entry that was read to the end, in the background; None if it was not."""
        try:
            if slabs is not None:
                self._storing.submit(self._promote, header, slabs)
                return
        except RuntimeError:  # closed
            self._count("promotions_dropped", 1)
        self._give_back(header)

    # Housekeeping

    def stats(self) -> RemoteStats:
        with self._changed:
            counts = Counter(self._counts)
        return RemoteStats(
            name=self._tier.name,
            breaker=self._breaker.state,
            writebacks_waiting_bytes=self._writes.waiting_bytes,
            **{name: counts[name] for name in _COUNTED},
        )

    def drain(self, timeout: float) -> bool:
        """Wait until all promotions and write-backs are done; False if that takes longer, or the server is down."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._promoting, timeout):
                return False
        return self._writes.drain(deadline - time.monotonic())

    def close(self) -> None:
        """Finish what is queued if the server is up, for five seconds at most; then cut all connections."""
        if self._breaker.closed:
            self._writes.drain(CLOSE_SECONDS)
        self._writes.stop()
        self._closed = True
        self._tier.close()
        self.lane.shutdown()
        for pool in (self._asking, self._moving):
            pool.shutdown(cancel_futures=True)
        self._storing.shutdown()
        self._writes.join(CLOSE_SECONDS)

    # Inside

    def _call(self, kind: str, pool: Executor, timeout: float, what: Callable[[], T]) -> T:
        """``what()`` on ``pool``, if the breaker lets it, in time, and with a RemoteError for everything else."""
        if self._closed or not self._breaker.closed:
            why = "the store is closed" if self._closed else "it failed before; it is probed in the background"
            raise RemoteError(f"{self._tier.name} is not asked: {why}", remote=self._tier.name)
        try:
            future = pool.submit(what)
            try:
                answer = future.result(timeout)
            finally:
                future.cancel()
        except RemoteError as error:
            failure = error
        except TimeoutError:
            failure = RemoteError(f"{self._tier.name} gave no answer in {1000 * timeout:.0f} ms")
        except Exception as error:  # a fault of the client library must not become the request's
            failure = RemoteError(f"{self._tier.name} cannot be used: {error!r}", remote=self._tier.name)
        else:
            self._breaker.success(kind)
            return answer
        self._count("errors", 1)
        self._breaker.failure(kind, failure.message)
        raise failure

    def _heads(self, keys: Sequence[bytes]) -> list[Bytes | None]:
        heads = self._tier.heads(keys)
        if len(heads) != len(keys):
            raise RemoteError(f"{self._tier.name} answers {len(keys)} questions with {len(heads)} answers")
        return heads

    def _header(self, key: bytes, raw: Bytes) -> EntryHeader | None:
        try:
            header = unpack_header(bytes(raw), None)
        except CorruptEntryError:
            header = None
        except StoreFormatError:
            return None  # another version's; it may read it yet
        if header is None or header.key != key:
            self.expel(key)
            return None
        return header

    def _promote(self, header: EntryHeader, slabs: Sequence[Array]) -> None:
        try:
            if self._keep is not None and self._keep(header, slabs):
                self._count("promotions", 1)
        except (StoreError, OSError) as error:
            log.debug("an entry of the remote tier was not kept: %s", error)
            self._count("promotions_dropped", 1)
        finally:
            self._give_back(header)

    def _give_back(self, header: EntryHeader) -> None:
        with self._changed:
            self._promoting -= header.file_bytes
            self._changed.notify_all()

    def _count(self, event: str, by: int) -> None:
        with self._changed:
            self._counts[event] += by


_COUNTED = (
    "errors",
    "corrupt",
    "bytes_in",
    "bytes_out",
    "promotions",
    "promotions_dropped",
    "writebacks",
    "writebacks_dropped",
    "deletes_failed",
)
