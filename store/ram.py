"""The RAM tier: whole entries, the least recently used one leaving first, never above a byte cap."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ragkv.store.buffers import Allocate, Array, Buffers, footprint
from ragkv.store.header import EntryHeader

IN_FLIGHT_BYTES = 128 << 20
"""Buffers kept for slabs on their way to the caller, besides those of the tier's own entries."""


class RamEntry(NamedTuple):
    """An entry's header and one read-only uint8 array per layer."""

    header: EntryHeader
    slabs: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        return entry_bytes(slab.nbytes for slab in self.slabs)


def entry_bytes(slabs: Iterable[int]) -> int:
    """What an entry whose slabs have these lengths takes of the RAM tier."""
    return sum(map(footprint, slabs))


class RamTier:
    """Safe to call from any thread. Arrays handed out stay valid after their entry has left.

    Entries lie in ``buffers``, which lends the memory of those that left to those that come; ``allocate``
    provides it, in the first place.
    """

    def __init__(self, capacity: int, allocate: Allocate | None = None) -> None:
        self.capacity = capacity
        self.buffers = Buffers(capacity + IN_FLIGHT_BYTES, allocate)
        self._entries: OrderedDict[bytes, RamEntry] = OrderedDict()
        self._used = 0
        self._reserved = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> RamEntry | None:
        """The entry, now the most recently used one."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def reserve(self, nbytes: int) -> bool:
        """Make room for an entry still being read, so that the cap holds meanwhile; False if none."""
        with self._lock:
            if self._reserved + nbytes > self.capacity:
                return False
            while self._used + self._reserved + nbytes > self.capacity:
                _, old = self._entries.popitem(last=False)
                self._used -= old.nbytes
            self._reserved += nbytes
            return True

    def release(self, nbytes: int) -> None:
        """Give a reservation back."""
        with self._lock:
            self._reserved -= nbytes

    def commit(self, key: bytes, entry: RamEntry) -> None:
        """Turn a reservation of ``entry.nbytes`` into the entry itself."""
        with self._lock:
            self._reserved -= entry.nbytes
            if key not in self._entries:
                self._entries[key] = entry
                self._used += entry.nbytes

    def drop(self, key: bytes) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._used -= entry.nbytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._used = 0

    @property
    def nbytes(self) -> int:
        return self._used

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries


def read_only(array: NDArray[Any]) -> Array:
    """A flat uint8 view of ``array`` that cannot be written through."""
    view = array.reshape(-1).view(np.uint8)
    view.flags.writeable = False
    return view
