"""Page-aligned memory, reused: touching a fresh page takes as long as reading its bytes from the disk.

A whole number of huge pages lies in such: direct I/O then hands the disk a few large pieces, not one per 4 KiB.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import StoreError
from ragkv.store.header import BLOCK, aligned

Array = NDArray[np.uint8]
Allocate = Callable[[int], Array]

ROUNDED_FROM = 64 << 10
HUGE_PAGE = 2 << 20


def footprint(nbytes: int) -> int:
    """Bytes of memory behind a buffer of ``nbytes``.

    Large ones are rounded up, by less than an eighth, so that slabs of nearly equal length can take each other's
    place.
    """
    if nbytes < ROUNDED_FROM:
        return nbytes
    step = 1 << (nbytes - 1).bit_length() - 4
    return -(-nbytes // step) * step


def aligned_empty(nbytes: int) -> Array:
    """An uninitialised uint8 array that begins on a page; on a huge one if it is a whole number of those."""
    # numpy asks the kernel for huge pages from 4 MiB on: two with the room to align one. What would fill only part
    # of its last one goes without, as it would take the memory of all of it.
    page = HUGE_PAGE if nbytes and nbytes % HUGE_PAGE == 0 else BLOCK
    raw = np.empty(nbytes + page, np.uint8)
    start = -raw.ctypes.data % page
    return raw[start : start + nbytes]


class Buffers:
    """Lends memory. It comes back by itself once the array lent, and every view of it, is gone.

    Args:
        limit: bytes, lent and idle together, above which memory that comes back is given up.
        allocate: provides fresh memory, such as page-locked; ordinary memory without it.

    Safe to call from any thread.
    """

    def __init__(self, limit: int, allocate: Allocate | None = None) -> None:
        self._limit = limit
        self._allocate = allocate or aligned_empty
        self._idle: OrderedDict[int, list[Array]] = OrderedDict()  # by size, the one needed last at the end
        self._returned: deque[Array] = deque()
        self._lock = threading.Lock()
        self._total = 0

    @property
    def nbytes(self) -> int:
        """Bytes lent and idle."""
        return self._total

    def take(self, nbytes: int) -> Array:
        """Lend a writable uint8 array of ``nbytes``, with anything in it, that begins on a page.

        Raises:
            StoreError: ``allocate`` gives something else than a uint8 array of the size it is asked for.
        """
        size = aligned(footprint(nbytes))
        with self._lock:
            self._settle()
            idle = self._idle.get(size)
            memory = idle.pop() if idle else None
            if memory is None:
                self._shed(size)
                self._total += size
            else:
                self._idle.move_to_end(size)
        if memory is None:
            memory = self._fresh(size)
        return np.asarray(_Loan(memory, self))[:nbytes]

    def close(self) -> None:
        """Give up what is idle, and from now on what comes back."""
        with self._lock:
            self._limit = 0
            self._settle()
            self._shed(0)

    def give_back(self, memory: Array) -> None:
        """For the loan alone. It may run anywhere, a garbage collection inside ``take`` included: never wait."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _fresh(self, size: int) -> Array:
        try:
            memory = self._allocate(size)
            if memory.shape != (size,) or memory.dtype != np.uint8:
                raise StoreError(f"allocate({size}) must return a uint8 array of that size")
        except BaseException:
            with self._lock:
                self._total -= size
            raise
        return memory

    def _settle(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            if self._total > self._limit:
                self._total -= memory.nbytes
            else:
                self._idle.setdefault(memory.nbytes, []).append(memory)

    def _shed(self, need: int) -> None:
        """Give up idle memory, of the sizes longest out of use first, until ``need`` more bytes fit the limit."""
        while self._idle and self._total + need > self._limit:
            size, idle = next(iter(self._idle.items()))
            if idle:
                idle.pop()
                self._total -= size
            else:
                del self._idle[size]


class _Loan:
    """What a lent array's memory belongs to."""

    def __init__(self, memory: Array, lender: Buffers) -> None:
        self._memory = memory
        self._lender = lender

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__

    def __del__(self) -> None:
        self._lender.give_back(self._memory)
