"""Write-back: one thread that uploads what was stored, deletes what was deleted, and probes a server that was down."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, RemoteRefusedError, StoreFormatError
from ragkv.store.files import read_header, read_into
from ragkv.store.header import EntryHeader
from ragkv.store.lease import lease
from ragkv.store.remote.breaker import Breaker
from ragkv.store.remote.tier import HEAD_BYTES, RemoteTier

MOST_DELETES = 100_000  # keys, of 32 bytes

log = logging.getLogger("ragkv")


class WriteBack:
    """Jobs wait by key alone, in the order they came; deletions go first. While the breaker is open all wait.

    A queued entry holds no lease: with the server down, that would pin the store's capacity. If it is evicted
    before its turn, it is dropped. It is leased while it is uploaded.

    Args:
        file_of: the path of an entry's file.
        capacity: bytes of entries that may wait; more are dropped. So are deletions of more than MOST_DELETES keys.
        count: called with the name of a field of ``RemoteStats``, and by how much it rises.
    """

    def __init__(
        self,
        tier: RemoteTier,
        breaker: Breaker,
        *,
        file_of: Callable[[bytes], str],
        capacity: int,
        count: Callable[[str, int], None],
    ) -> None:
        self._tier, self._breaker, self._file_of, self._count = tier, breaker, file_of, count
        self._capacity = capacity
        self._uploads: OrderedDict[bytes, int] = OrderedDict()
        self._waiting = 0
        self._deletes: deque[tuple[list[bytes], threading.Event]] = deque()
        self._doomed = 0
        self._busy = False
        self._stopping = False
        self._changed = threading.Condition()
        breaker.on_change = self._wake
        self._thread = threading.Thread(target=self._run, name="ragkv-remote-writeback", daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        return self._waiting

    def add(self, key: bytes, nbytes: int) -> None:
        """Queue an entry for upload, or drop it if too much is waiting. Never blocks."""
        with self._changed:
            waiting = self._waiting + nbytes - self._uploads.get(key, 0)
            fits = not self._stopping and waiting <= self._capacity
            if fits:
                self._uploads[key], self._waiting = nbytes, waiting
                self._changed.notify_all()
        if not fits:
            self._count("writebacks_dropped", 1)

    def delete(self, keys: Sequence[bytes]) -> threading.Event:
        """Delete objects, next in turn, and forget their uploads. The event is set when that was tried, or dropped as
        too much is waiting.
        """
        done = threading.Event()
        with self._changed:
            for key in keys:
                self._waiting -= self._uploads.pop(key, 0)
            fits = not self._stopping and (not self._deletes or self._doomed + len(keys) <= MOST_DELETES)
            if fits:
                self._deletes.append((list(keys), done))
                self._doomed += len(keys)
            self._changed.notify_all()
        if not fits:
            done.set()
            self._count("deletes_failed", len(keys))
        return done

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is left to do; False if that takes longer, or the server is down."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._busy or self._uploads or self._deletes:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
        return True

    def stop(self) -> None:
        """Take no further job; what waits is dropped."""
        with self._changed:
            self._stopping = True
            uploads, deletes = len(self._uploads), self._doomed
            self._uploads.clear()
            self._waiting = self._doomed = 0
            self._deletes.clear()
            self._changed.notify_all()
        self._count("writebacks_dropped", uploads)
        self._count("deletes_failed", deletes)
        if uploads or deletes:
            log.warning("closed with %d uploads and %d deletions not done on the remote tier", uploads, deletes)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not self._stopping:
                job = self._due()
                if job is not None:
                    self._busy = True
                    return job
                self._changed.wait(self._breaker.seconds_to_probe())
            return None

    def _due(self) -> Callable[[], None] | None:
        if not self._breaker.closed:
            return (lambda: self._breaker.probe(self._well)) if self._breaker.seconds_to_probe() == 0.0 else None
        if self._deletes:
            keys, done = self._deletes.popleft()
            self._doomed -= len(keys)
            return lambda: self._delete(keys, done)
        if self._uploads:
            key, nbytes = self._uploads.popitem(last=False)
            self._waiting -= nbytes
            return lambda: self._upload(key, nbytes)
        return None

    def _well(self) -> bool:
        try:
            self._tier.ping()
        except Exception:  # whatever a client library throws: the server is not well
            return False
        return True

    def _down(self, error: Exception) -> bool:
        """After a failure: is it the server, and not what was asked of it? Then everything waits for it."""
        if isinstance(error, RemoteRefusedError):
            return False
        self._count("errors", 1)
        if self._well():
            return False
        self._breaker.trip(str(error))
        return True

    def _delete(self, keys: list[bytes], done: threading.Event) -> None:
        try:
            self._tier.delete(keys)
        except Exception as error:
            if self._down(error):
                with self._changed:
                    self._deletes.appendleft((keys, done))
                    self._doomed += len(keys)
            else:
                self._count("deletes_failed", len(keys))
        finally:
            done.set()

    def _upload(self, key: bytes, nbytes: int) -> None:
        sent = None
        try:
            sent = self._send(key)
        except (CorruptEntryError, StoreFormatError):
            pass  # for the next reader to find
        except Exception as error:
            if self._down(error):
                self._requeue(key, nbytes)
                return
        if sent is None:
            self._count("writebacks_dropped", 1)
        elif sent:
            self._count("writebacks", 1)
            self._count("bytes_out", sent)

    def _requeue(self, key: bytes, nbytes: int) -> None:
        with self._changed:
            if not self._stopping:
                self._waiting += nbytes - self._uploads.get(key, 0)
                self._uploads[key] = nbytes
                self._uploads.move_to_end(key, last=False)
                return
        self._count("writebacks_dropped", 1)

    def _send(self, key: bytes) -> int | None:
        """Upload the entry; the bytes sent, 0 if it is there already, None if it is gone here."""
        fd = lease(self._file_of(key))
        if fd is None:
            return None
        try:
            header = read_header(fd)
            if header.key != key or header.header_bytes > HEAD_BYTES:
                return None
            if self._tier.heads([key])[0] is not None:
                return 0
            with contextlib.closing(_parts(fd, header)) as parts:
                self._tier.put(key, parts)
            return header.file_bytes
        finally:
            os.close(fd)


def _parts(fd: int, header: EntryHeader) -> Generator[memoryview]:
    """The file, cut where slabs begin, each slab verified: rot must not spread."""
    cuts = [slab.offset for slab in header.slabs] + [header.file_bytes]
    yield memoryview(os.pread(fd, header.header_bytes, 0))
    buffer = np.empty(max(end - start for start, end in pairwise(cuts)), np.uint8)
    for slab, (start, end) in zip(header.slabs, pairwise(cuts), strict=True):
        part = buffer[: end - start]
        read_into(fd, part, start)
        if xxhash.xxh3_64_intdigest(part[: slab.nbytes].data) != slab.checksum:
            raise CorruptEntryError("the slab does not match its checksum; it is not uploaded", key=header.key.hex())
        yield part.data
