"""The shelf as LMDB keeps it: the order of leaving, the ghosts and the state, in one transaction with the rows."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ragkv.store.rows import Ghost, Place, ShelfState

FORGOTTEN_AT_ONCE = 8

_GHOST = struct.Struct("<QQB")
_NUMBER = struct.Struct(">Q")
_NAME_BYTES = 16
_STATE = b"state"


class Queues:
    """Who stands where, and who stood here once. The rows are ``IndexTxn``'s."""

    def __init__(self, txn: Any, order: Any, ghosts: Any, state: Any) -> None:
        self._txn = txn
        self._order = order
        self._ghosts = ghosts
        self._state = state

    def at(self, place: Place) -> bytes | None:
        """The key that stands there."""
        key: bytes | None = self._txn.get(place.pack(), db=self._order)
        return key

    def add(self, place: Place, key: bytes) -> None:
        self._txn.put(place.pack(), key, db=self._order)

    def drop(self, place: Place) -> None:
        self._txn.delete(place.pack(), db=self._order)

    def next(self, queue: int, after: Place | None) -> tuple[Place, bytes] | None:
        """The first of a queue, or the first behind ``after``."""
        start = Place(queue).pack() if after is None else after.pack() + b"\0"
        with self._txn.cursor(self._order) as cursor:
            if cursor.set_range(start) and cursor.key()[0] == queue:
                return Place.unpack(cursor.key()), cursor.value()
        return None

    def __iter__(self) -> Iterator[tuple[Place, bytes]]:
        with self._txn.cursor(self._order) as cursor:
            for place, key in cursor:
                yield Place.unpack(place), key

    def __len__(self) -> int:
        return int(self._txn.stat(self._order)["entries"])

    def clear(self) -> None:
        """Forget all of it: the order, the ghosts, the state."""
        for database in (self._order, self._ghosts, self._state):
            self._txn.drop(database, delete=False)

    def load(self) -> ShelfState | None:
        """The state; None if it is damaged, or was never saved."""
        return ShelfState.unpack(self._txn.get(_STATE, b"", db=self._state))

    def save(self, state: ShelfState) -> None:
        self._txn.put(_STATE, state.pack(), db=self._state)

    def remember(self, key: bytes, ghost: Ghost, *, number: int, most: int) -> None:
        """Note who left; of more than ``most`` the oldest are forgotten."""
        self.recall(key)
        # Two records: one by name, and one by number to find the oldest.
        name = key[:_NAME_BYTES]
        self._txn.put(b"k" + name, _GHOST.pack(number, ghost.gone, ghost.uses), db=self._ghosts)
        before = self._txn.replace(b"#" + _NUMBER.pack(number), name, db=self._ghosts)
        if before is not None:  # numbers began again, as the state was lost
            self._txn.delete(b"k" + before, db=self._ghosts)
        excess = self._txn.stat(self._ghosts)["entries"] // 2 - most
        if excess > 0:
            # After most entries were deleted there are millions too many: not all in one go.
            with self._txn.cursor(self._ghosts) as cursor:
                cursor.set_range(b"#")
                oldest = list(islice(cursor, min(excess, FORGOTTEN_AT_ONCE)))
            for at, forgotten in oldest:
                self._txn.delete(at, db=self._ghosts)
                self._txn.delete(b"k" + forgotten, db=self._ghosts)

    def recall(self, key: bytes) -> Ghost | None:
        """What is remembered of the key; remembering it ends with that."""
        value = self._txn.pop(b"k" + key[:_NAME_BYTES], db=self._ghosts)
        if value is None or len(value) != _GHOST.size:
            return None
        number, gone, uses = _GHOST.unpack(value)
        self._txn.delete(b"#" + _NUMBER.pack(number), db=self._ghosts)
        return Ghost(uses, gone)
