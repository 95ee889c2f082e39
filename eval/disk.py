"""What the disk itself gives: a plain direct-I/O reader and writer, the yardsticks the store is held against."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import StoreError
from ragkv.store.buffers import aligned_empty
from ragkv.store.files import go_direct

PAGE = 4096
BLOCK_BYTES = 8 << 20

Path = str | os.PathLike[str]
Bytes = NDArray[np.uint8]
Request = tuple[int, int, int]
"""Descriptor, offset, bytes."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes moved, how long it took, and whether the page cache was bypassed (a tmpfs has nothing but)."""

    nbytes: int
    seconds: float
    direct: bool

    @property
    def gbps(self) -> float:
        """1e9 bytes a second."""
        return self.nbytes / self.seconds / 1e9


def raw_read(paths: Sequence[Path], queue_depth: int = 4, block: int = BLOCK_BYTES) -> Transfer:
    """Read whole files in aligned blocks of ``block`` bytes, ``queue_depth`` of them in flight, one file after
    the other. Nothing is looked at; buffers are reused.

    Raises:
        StoreError: a file cannot be read, or is shorter than it was.
    """
    with _opened(paths, os.O_RDONLY) as (fds, direct):
        requests = [r for fd in fds for r in _requests(fd, os.fstat(fd).st_size, block)]
        seconds = _timed(requests, queue_depth, block, lambda fd, view, at: os.preadv(fd, [view], at))
    return Transfer(sum(nbytes for _, _, nbytes in requests), seconds, direct)


def raw_write(paths: Sequence[Path], nbytes: int, queue_depth: int = 4, block: int = BLOCK_BYTES) -> Transfer:
    """Write files of ``nbytes`` (whole pages) each, as :func:`raw_read` reads: preallocated, random bytes, and at
    the end one fsync per file and per folder, which the time includes.

    Raises:
        StoreError: a file exists, or cannot be written.
    """
    if nbytes < 1 or nbytes % PAGE:
        raise StoreError(f"direct I/O writes whole pages of {PAGE} bytes, not {nbytes}", nbytes=nbytes)
    with _opened(paths, os.O_RDWR | os.O_CREAT | os.O_EXCL) as (fds, direct):
        requests = [r for fd in fds for r in _requests(fd, nbytes, block)]

        def prepare() -> None:
            # Without it every write grows the file, one at a time: slower on ext4, by a third.
            for fd in fds:
                os.posix_fallocate(fd, 0, nbytes)

        def finish() -> None:
            for fd in fds:
                os.fsync(fd)
            for folder in {os.path.dirname(os.path.abspath(path)) for path in paths}:
                _sync_folder(folder)

        seconds = _timed(requests, queue_depth, block, os.pwrite, prepare, finish)
    return Transfer(nbytes * len(fds), seconds, direct)


def _timed(
    requests: Sequence[Request],
    queue_depth: int,
    block: int,
    move: Callable[[int, memoryview, int], int],
    prepare: Callable[[], None] = lambda: None,
    finish: Callable[[], None] = lambda: None,
) -> float:
    todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in requests:
        todo.put(request)

    def work(buffer: Bytes) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                fd, at, nbytes = todo.get_nowait()
                if move(fd, buffer[:nbytes].data, at) != nbytes:
                    raise StoreError("the disk moved fewer bytes than asked for", offset=at, nbytes=nbytes)

    # Memory's first touch costs as much as the disk: it stays outside, for us as for who is compared with us.
    buffers = [_random(block) for _ in range(queue_depth)]
    with ThreadPoolExecutor(queue_depth) as threads, _named_errors():
        started = time.perf_counter()
        prepare()
        for done in [threads.submit(work, buffer) for buffer in buffers]:
            done.result()
        finish()
        return time.perf_counter() - started


@contextlib.contextmanager
def _opened(paths: Sequence[Path], flags: int) -> Iterator[tuple[list[int], bool]]:
    fds: list[int] = []
    direct = True
    with contextlib.ExitStack() as stack, _named_errors():
        for path in paths:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            direct = go_direct(fd) and direct
            fds.append(fd)
        yield fds, direct


def _requests(fd: int, size: int, block: int) -> list[Request]:
    return [(fd, at, min(block, size - at)) for at in range(0, size, block)]


def _random(nbytes: int) -> Bytes:
    buffer = aligned_empty(nbytes)
    buffer[:] = np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8)
    return buffer


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"measuring the disk: {error.strerror}: {error.filename or ''}; try another --path") from error
