"""The RAM tier: whole entries, what is of least use leaving first, never above a byte cap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from ragkv.store.buffers import HUGE_PAGE, Allocate, Array, Buffers, footprint
from ragkv.store.header import EntryHeader
from ragkv.store.policies import CostAware, evict
from ragkv.store.shelf import MemoryItem, MemoryShelf

IN_FLIGHT_BYTES = 128 << 20
"""Buffers kept for slabs on their way to the caller, besides those of the tier's own entries."""


@dataclass(frozen=True, eq=False)
class RamEntry:
    """An entry's header and one read-only uint8 array per layer."""

    header: EntryHeader
    slabs: tuple[Array, ...]

    @cached_property
    def addresses(self) -> NDArray[np.int64]:
        """Where each layer's slab lies."""
        return np.array([slab.__array_interface__["data"][0] for slab in self.slabs], np.int64)

    @cached_property
    def pages(self) -> frozenset[int]:
        """Numbers of the huge pages that slabs lie in."""
        ends = ((at, at + slab.nbytes) for at, slab in zip(self.addresses.tolist(), self.slabs, strict=True))
        return frozenset(page for start, end in ends for page in range(start // HUGE_PAGE, -(-end // HUGE_PAGE)))

    @cached_property
    def slab_bytes(self) -> int | None:
        """Of every layer; None where they differ."""
        sizes = {slab.nbytes for slab in self.slabs}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def nbytes(self) -> int:
        return entry_bytes(slab.nbytes for slab in self.slabs)


def entry_bytes(slabs: Iterable[int]) -> int:
    """What an entry whose slabs have these lengths takes of the RAM tier."""
    return sum(map(footprint, slabs))


class Hold:
    """A key's entry is open while something refers to this: one for all who have it, whatever left and came back since.

    References, where a count would want a lock and a finalizer: so closing twice, an interrupt halfway and a garbage
    collection in the middle of anything each give back just what was taken.
    """

    __slots__ = ("__weakref__",)


GONE = ref(Hold())


class RamTier:
    """Safe to call from any thread. Arrays handed out stay valid after their entry has left.

    Who leaves says the cost-aware policy. What an entry costs here is to read its bytes again: those used least
    leave first, and new ones that are not used soon before them. It is told of uses when it is asked, or when there is
    time (:meth:`settle`), and not while an entry is opened.

    Entries lie in ``buffers``, which lends the memory of those that left to those that come; ``allocate``
    provides it, in the first place.
    """

    def __init__(self, capacity: int, allocate: Allocate | None = None) -> None:
        self.capacity = capacity
        self.buffers = Buffers(capacity + IN_FLIGHT_BYTES, allocate)
        self._entries: dict[bytes, RamEntry] = {}
        self._held: dict[bytes, ref[Hold]] = {}  # also of entries that left while open, and some dead ones
        self._going: set[bytes] = set()
        self._uses: dict[bytes, int] = {}
        self._shelf = MemoryShelf()
        self._policy = CostAware()
        self._used = 0
        self._reserved = 0
        self._given_back: list[int] = []
        self._lock = threading.Lock()

    def open(self, keys: Sequence[bytes]) -> list[tuple[RamEntry, Hold] | None]:
        """The entries of ``keys`` that are here, used once more, each with what keeps it open while referred to."""
        with self._lock:
            entries, uses, held = self._entries, self._uses, self._held
            found: list[tuple[RamEntry, Hold] | None] = []
            for key in keys:
                entry = entries.get(key)
                if entry is None:
                    found.append(None)
                else:
                    hold = held.get(key, GONE)()
                    if hold is None:
                        hold = Hold()
                        held[key] = ref(hold)
                    found.append((entry, hold))
                    uses[key] = uses.pop(key, 0) + 1  # the latest use last
        return found

    def is_open(self, key: bytes) -> bool:
        """Whether somebody has the entry open from here, even if it has left since."""
        return self._held.get(key, GONE)() is not None

    def let_go(self, key: bytes, remove: Callable[[bytes], bool]) -> bool:
        """Drop an entry and ``remove`` its file, which says whether it is gone; False if it is open, or not gone.

        Until then it does not come back, so nobody opens it from here. Whoever reads its file to the end meanwhile
        does so under a lease, and opens it from there again. The disk is not waited for under the lock.
        Only one may remove a key at a time.
        """
        try:
            with self._lock:
                if self.is_open(key):
                    return False
                self._drop(key)
                self._going.add(key)
            return remove(key)
        finally:
            self._going.discard(key)

    def settle(self) -> None:
        """Tell the policy of the uses so far."""
        with self._lock:
            self._settle()

    def reserve(self, nbytes: int) -> bool:
        """Make room for an entry still being read, so that the cap holds meanwhile; False if none."""
        with self._lock:
            while self._given_back:
                self._reserved -= self._given_back.pop()
            if self._reserved + nbytes > self.capacity:
                return False
            self._evict(self.capacity - self._reserved - nbytes)
            self._reserved += nbytes
            return True

    def release(self, nbytes: int) -> None:
        """Give a reservation back. A collection may do so in the middle of any other method: it takes no lock."""
        self._given_back.append(nbytes)

    def commit(self, key: bytes, entry: RamEntry) -> None:
        """Turn a reservation of ``entry.nbytes`` into the entry itself, unless it is here, or its file is going."""
        with self._lock:
            self._reserved -= entry.nbytes
            if key not in self._entries and key not in self._going:
                self._settle()
                item = MemoryItem(entry.nbytes, cost=entry.nbytes)
                self._entries[key] = entry
                self._shelf.put(key, item.at(self._policy.admit(self._shelf, item, self._shelf.recall(key))))
                self._used += entry.nbytes

    def drop(self, key: bytes) -> None:
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._shelf = MemoryShelf()
            self._used = 0

    @property
    def nbytes(self) -> int:
        return self._used

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._shelf.delete(key)
            self._used -= entry.nbytes

    def _settle(self) -> None:
        uses, self._uses = self._uses, {}
        for key, times in uses.items():
            item = self._shelf.get(key)
            if item is not None:
                self._shelf.move(key, self._policy.use(self._shelf, item, times))
        self._held = {key: held for key, held in self._held.items() if held() is not None}

    def _evict(self, room: int) -> None:
        if self._used <= room:
            return
        self._settle()
        for key, item in self._policy.victims(self._shelf):
            evict(self._shelf, key, item)
            del self._entries[key]
            self._used -= item.nbytes
            if self._used <= room:
                return

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries


def read_only(array: NDArray[Any]) -> Array:
    """A flat uint8 view of ``array`` that cannot be written through."""
    view = array.reshape(-1).view(np.uint8)
    view.flags.writeable = False
    return view
