"""What an eviction policy sees of a cache, and a cache in memory that is nothing but that.

The index is a shelf (``txn.IndexTxn``), and so is ``MemoryShelf``: the policy that serves is the one that is
simulated.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import NamedTuple, Protocol, Self

from ragkv.store.rows import QUEUES, Ghost, Place, ShelfState

GHOSTS_PER_ENTRY = 4
"""A key takes a hundred bytes, its KV a million: a cache can afford to remember more than it holds."""


class Item(Protocol):
    """An entry as far as a policy cares: bytes on the disk, cost to compute it again, place."""

    @property
    def nbytes(self) -> int: ...
    @property
    def cost(self) -> int: ...
    @property
    def place(self) -> Place: ...


class Shelf(Protocol):
    """Entries in queues, each queue in the order of (priority, tick), and ghosts of some that had to leave."""

    @property
    def state(self) -> ShelfState:
        """Kept with the shelf, which carries the policies' own fields without knowing them."""

    def __len__(self) -> int: ...

    def next(self, queue: int, after: Place | None = None) -> tuple[bytes, Item] | None:
        """The first entry of a queue, or the first behind ``after``."""

    def move(self, key: bytes, place: Place) -> None:
        """Give an entry of the shelf another place."""

    def delete(self, key: bytes) -> bool:
        """Take an entry off the shelf; says whether it was there."""

    def remember(self, key: bytes, ghost: Ghost) -> None:
        """Keep a ghost; of more than ``GHOSTS_PER_ENTRY`` the oldest are forgotten."""

    def recall(self, key: bytes) -> Ghost | None:
        """Take a key's ghost back."""


class MemoryItem(NamedTuple):
    nbytes: int
    cost: int
    place: Place = Place()

    def at(self, place: Place) -> Self:
        return self._replace(place=place)


class MemoryShelf:
    """A shelf in memory. Each operation takes O(log n), as long as the first of a queue is what is asked for."""

    def __init__(self) -> None:
        self.state = ShelfState()
        self._items: dict[bytes, MemoryItem] = {}
        self._heaps: list[list[tuple[int, int, bytes]]] = [[] for _ in range(QUEUES)]
        self._ghosts: OrderedDict[bytes, Ghost] = OrderedDict()

    def get(self, key: bytes) -> MemoryItem | None:
        return self._items.get(key)

    def put(self, key: bytes, item: MemoryItem) -> None:
        self.delete(key)
        place = item.place
        self._items[key] = item
        self.state.nbytes[place.queue] += item.nbytes
        self._push(key, place)

    def move(self, key: bytes, place: Place) -> None:
        old = self._items[key]
        self._items[key] = MemoryItem(old.nbytes, old.cost, place)
        if place.order != old.place.order:
            self.state.nbytes[old.place.queue] -= old.nbytes
            self.state.nbytes[place.queue] += old.nbytes
            self._push(key, place)

    def delete(self, key: bytes) -> bool:
        item = self._items.pop(key, None)
        if item is not None:
            self.state.nbytes[item.place.queue] -= item.nbytes
        return item is not None

    def next(self, queue: int, after: Place | None = None) -> tuple[bytes, MemoryItem] | None:
        heap, items = self._heaps[queue], self._items
        while heap:
            priority, tick, key = heap[0]
            item = items.get(key)
            if item is None or item.place.order != (queue, priority, tick):
                heapq.heappop(heap)  # it has left, or moved on
            elif after is not None and item.place.order <= after.order:
                return self._behind(after)
            else:
                return key, item
        return None

    def remember(self, key: bytes, ghost: Ghost) -> None:
        self._ghosts[key] = ghost
        while len(self._ghosts) > GHOSTS_PER_ENTRY * len(self):
            self._ghosts.popitem(last=False)

    def recall(self, key: bytes) -> Ghost | None:
        return self._ghosts.pop(key, None)

    def __len__(self) -> int:
        return len(self._items)

    def _push(self, key: bytes, place: Place) -> None:
        heap = self._heaps[place.queue]
        heapq.heappush(heap, (place.priority, place.tick, key))
        if len(heap) > 2 * len(self) + 64:
            # Much was used and nothing had to leave: most of it are places of the past.
            now = ((k, i.place) for k, i in self._items.items() if i.place.queue == place.queue)
            heap[:] = [(p.priority, p.tick, k) for k, p in now]
            heapq.heapify(heap)

    def _behind(self, after: Place) -> tuple[bytes, MemoryItem] | None:
        """Where an entry was refused, as none ever is in a simulation: a search is good enough."""
        queued = ((k, i) for k, i in self._items.items() if i.place.queue == after.queue)
        return min((e for e in queued if e[1].place.order > after.order), key=lambda e: e[1].place.order, default=None)
