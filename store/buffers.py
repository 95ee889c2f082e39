"""Page-aligned memory, reused: touching a fresh page takes as long as reading its bytes from the disk.

It is taken in regions of whole huge pages, each cut into buffers of one size: direct I/O then hands the disk a few
large pieces, not one per 4 KiB.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import StoreError
from ragkv.store.header import BLOCK, aligned

Array = NDArray[np.uint8]
Allocate = Callable[[int], Array]

SHARED_FROM = 64 << 10
"""Smaller buffers are memory of their own: nothing so small is read past the page cache."""
HUGE_PAGE = 2 << 20


@lru_cache(maxsize=4096)
def cut(nbytes: int) -> tuple[int, int]:
    """Bytes of a region for buffers of ``nbytes``, and how many it holds.

    It is the smallest whose waste is an eighth of them at most, up to ten times their size. Lengths that nearly
    agree are cut alike, so that their buffers can take each other's place.
    """
    need = aligned(nbytes)
    if need < SHARED_FROM:
        return need, 1
    region = -(-need // HUGE_PAGE) * HUGE_PAGE
    while region * 8 > region // need * need * 9:
        region += HUGE_PAGE
    return region, region // need


def footprint(nbytes: int) -> int:
    """Bytes of memory behind a buffer of ``nbytes``: its share of a region, or what it is long if that is little."""
    if nbytes < SHARED_FROM:
        return nbytes
    region, count = cut(nbytes)
    return -(-region // count)


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

    A region is given up when none of its buffers is lent. So that a few lent ones cannot keep much more memory than
    they are long, what does not fit the limit comes in pieces of its own.

    Args:
        limit: bytes, lent and idle together, above which memory that comes back is given up. Regions keep it always.
        allocate: provides fresh memory, such as page-locked; ordinary memory without it.

    Safe to call from any thread.
    """

    def __init__(self, limit: int, allocate: Allocate | None = None) -> None:
        self._limit = limit
        self._allocate = allocate or aligned_empty
        self._open: dict[int, dict[_Region, None]] = {}  # with idle buffers, by their size
        self._whole: OrderedDict[_Region, None] = OrderedDict()  # with nothing lent, longest so first
        self._returned: deque[tuple[_Region, Array]] = deque()
        self._lock = threading.Lock()
        self._total = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all memory held, lent or idle."""
        return self._total

    def take(self, nbytes: int) -> Array:
        """Lend a writable uint8 array of ``nbytes``, with anything in it, that begins on a page.

        Raises:
            StoreError: ``allocate`` gives something else than a uint8 array of the size it is asked for.
        """
        whole, count = cut(nbytes)
        size = whole // count // BLOCK * BLOCK
        with self._lock:
            self._settle()
            region = next(iter(self._open.get(size, ())), None)
            if region is not None:
                buffer = self._pop(region)
            else:
                whole = self._room(whole, size)
        if region is None:
            region = self._fresh(whole, size)
            with self._lock:
                buffer = self._pop(region)
        return np.asarray(_Loan(buffer, region, self))[:nbytes]

    def close(self) -> None:
        """Give up what is idle, and from now on what comes back."""
        with self._lock:
            self._limit = 0
            self._settle()
            self._shed(0)

    def give_back(self, region: _Region, buffer: Array) -> None:
        """For the loan alone. It may run anywhere, a garbage collection inside ``take`` included: never wait."""
        self._returned.append((region, buffer))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _room(self, whole: int, size: int) -> int:
        """What may be allocated, counted already: a ``whole`` region, or one buffer of ``size`` if that fits better."""
        self._shed(whole)
        granted = whole if self._total + whole <= self._limit else size
        self._total += granted
        return granted

    def _fresh(self, nbytes: int, size: int) -> _Region:
        try:
            memory = self._allocate(nbytes)
            if memory.shape != (nbytes,) or memory.dtype != np.uint8:
                raise StoreError(f"allocate({nbytes}) must return a uint8 array of that size")
        except BaseException:
            with self._lock:
                self._total -= nbytes
            raise
        return _Region(memory, size)

    def _pop(self, region: _Region) -> Array:
        buffer = region.idle.pop()
        self._whole.pop(region, None)
        if region.idle:
            self._open.setdefault(buffer.nbytes, {})[region] = None
        else:
            self._forget(region)
        return buffer

    def _settle(self) -> None:
        while self._returned:
            region, buffer = self._returned.popleft()
            region.idle.append(buffer)
            self._open.setdefault(region.size, {})[region] = None
            if len(region.idle) == region.count:
                self._whole[region] = None
                if self._total > self._limit:
                    self._drop(region)

    def _shed(self, need: int) -> None:
        """Give up regions with nothing lent, longest so first, until ``need`` more bytes fit the limit."""
        while self._whole and self._total + need > self._limit:
            self._drop(next(iter(self._whole)))

    def _drop(self, region: _Region) -> None:
        del self._whole[region]
        self._forget(region)
        self._total -= region.nbytes

    def _forget(self, region: _Region) -> None:
        regions = self._open.get(region.size, {})
        regions.pop(region, None)
        if not regions:
            self._open.pop(region.size, None)


class _Region:
    """One piece of memory, cut into ``count`` buffers of ``size`` bytes; those that are not lent."""

    def __init__(self, memory: Array, size: int) -> None:
        self.size, self.nbytes = size, memory.nbytes
        self.idle = [memory[at : at + size] for at in range(0, memory.nbytes - size + 1, size)]
        self.count = len(self.idle)


class _Loan:
    """What a lent array's memory belongs to."""

    def __init__(self, buffer: Array, region: _Region, lender: Buffers) -> None:
        self._buffer = buffer
        self._region = region
        self._lender = lender

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._buffer.__array_interface__

    def __del__(self) -> None:
        self._lender.give_back(self._region, self._buffer)
