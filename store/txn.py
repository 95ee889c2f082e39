"""What can be done inside one transaction of the index: rows, the order of eviction, tallies, always in step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ragkv.store.queues import Queues
from ragkv.store.rows import QUEUES, TALLY, Ghost, Place, Row, ShelfState, pack_row, unpack_row
from ragkv.store.shelf import GHOSTS_PER_ENTRY


class IndexTxn:
    """A write transaction. Everything it changes appears at once, or not at all."""

    def __init__(self, txn: Any, entries: Any, order: Any, models: Any, ghosts: Any, state: Any) -> None:
        self._txn = txn
        self._entries = entries
        self._models = models
        self._queues = Queues(txn, order, ghosts, state)
        self._state: ShelfState | None = None

    def get(self, key: bytes) -> Row | None:
        value = self._txn.get(key, db=self._entries)
        return None if value is None else unpack_row(key, value)

    def put(self, key: bytes, row: Row) -> None:
        """Insert or replace a row. One without a place keeps that of the row it replaces, or leaves first."""
        old = self.get(key)
        if not row.place.tick:
            row = row.at(old.place if old else Place(tick=self.state.next_tick()))
        if old:
            self._drop(key, old)
        self._insert(key, row)

    def delete(self, key: bytes) -> bool:
        row = self.get(key)
        if row is not None:
            self._drop(key, row)
        return row is not None

    def _insert(self, key: bytes, row: Row) -> None:
        self._txn.put(key, pack_row(key, row), db=self._entries)
        self._queues.add(row.place, key)
        self.state.nbytes[row.place.queue] += row.nbytes
        self._tally(row, 1)

    def _drop(self, key: bytes, row: Row) -> None:
        self._txn.delete(key, db=self._entries)
        self._queues.drop(row.place)
        self.state.nbytes[row.place.queue] -= row.nbytes
        self._tally(row, -1)

    # As a shelf (see shelf.py)

    @property
    def state(self) -> ShelfState:
        """Of all entries together; the index saves it with the transaction."""
        if self._state is None:
            self._state = self._queues.load() or self._derived()
        return self._state

    def save(self) -> None:
        if self._state is not None:
            self._queues.save(self._state)

    def next(self, queue: int, after: Place | None = None) -> tuple[bytes, Row] | None:
        """The first row of a queue, or the first behind ``after``."""
        while found := self._queues.next(queue, after):
            after, key = found
            row = self.get(key)
            # One that is damaged, or stands elsewhere, is no victim: it waits for the order to be rebuilt.
            if row is not None and row.place.order == after.order:
                return key, row
        return None

    def move(self, key: bytes, place: Place) -> None:
        """Give a row another place."""
        row = self.get(key)
        if row is None:
            return
        if place.order != row.place.order:
            self._queues.drop(row.place)
            self._queues.add(place, key)
            self.state.nbytes[row.place.queue] -= row.nbytes
            self.state.nbytes[place.queue] += row.nbytes
        self._txn.put(key, pack_row(key, row.at(place)), db=self._entries)

    def remember(self, key: bytes, ghost: Ghost) -> None:
        self._queues.remember(key, ghost, number=sum(self.state.gone), most=GHOSTS_PER_ENTRY * len(self))

    def recall(self, key: bytes) -> Ghost | None:
        return self._queues.recall(key)

    def __len__(self) -> int:
        return int(self._txn.stat(self._entries)["entries"])

    # As a whole

    def models(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes per model fingerprint."""
        with self._txn.cursor(self._models) as cursor:
            return {model.decode(errors="replace"): TALLY.unpack(value) for model, value in cursor}

    def nbytes(self) -> int:
        """Bytes of all entries, as the disk counts them."""
        return sum(nbytes for _, nbytes in self.models().values())

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        with self._txn.cursor(self._entries) as cursor:
            if prefix and not cursor.set_range(prefix):
                return []
            keys = cursor.iternext(values=False)
            return list(itertools.takewhile(lambda key: key.startswith(prefix), keys) if prefix else keys)

    def rows(self) -> Iterator[tuple[bytes, Row | None]]:
        """Every key with its row; None where the row does not match its checksum."""
        with self._txn.cursor(self._entries) as cursor:
            for key, value in cursor:
                yield key, unpack_row(key, value)

    def in_order(self, key: bytes, row: Row) -> bool:
        """Whether the order of eviction has the row in its place."""
        return self._queues.at(row.place) == key

    def ordered(self) -> int:
        """How many places the order of eviction has."""
        return len(self._queues)

    def rebuild(self) -> None:
        """Drop damaged rows, and derive the order of eviction and the tallies from the sound ones."""
        sound = []
        for key, row in list(self.rows()):
            if row is None:
                self._txn.delete(key, db=self._entries)
            else:
                sound.append((row.place, key, row))
        self._queues.clear()
        self._txn.drop(self._models, delete=False)
        self._state = ShelfState(tick=max((place.tick for place, _, _ in sound), default=0))
        for place, key, row in sorted(sound):
            taken = self._queues.at(place) is not None
            self._insert(key, row.at(place._replace(tick=self.state.next_tick())) if taken else row)
        self._state.age = self._lowest()

    def _derived(self) -> ShelfState:
        state = ShelfState()
        for place, key in self._queues:
            state.tick = max(state.tick, place.tick)
            row = self.get(key)
            if row is not None and row.place.order == place.order:
                state.nbytes[place.queue] += row.nbytes
        state.age = self._lowest()
        return state

    def _lowest(self) -> int:
        """The lowest priority: what the age was about, or newcomers would stand far from those that are here."""
        found = self._queues.next(QUEUES - 1, None)
        return found[0].priority if found else 0

    def _tally(self, row: Row, sign: int) -> None:
        model = row.model.encode()
        count, nbytes = TALLY.unpack(self._txn.get(model, bytes(TALLY.size), db=self._models))
        count, nbytes = count + sign, nbytes + sign * row.nbytes
        if count:
            self._txn.put(model, TALLY.pack(count, nbytes), db=self._models)
        else:
            self._txn.delete(model, db=self._models)
