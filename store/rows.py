"""The values of the index, packed and unpacked."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

DATABASES = (b"entries", b"order", b"models", b"ghosts", b"state")
TALLY = struct.Struct("<QQ")
"""One model's entries and bytes."""
QUEUES = 3
FOREIGN = 1

_ROW = struct.Struct("<QQQdIIHHBB")
_ORDER = struct.Struct(">BQQ")
_STATE = struct.Struct("<QQB2Q3Q")
_SUM = struct.Struct("<Q")
LAYOUT = b" ".join([*DATABASES, *(s.format.encode() for s in (TALLY, _ROW, _ORDER, _STATE))])
"""An index laid out in another way is rebuilt from the entries' headers."""


class Place(NamedTuple):
    """Where an entry stands among those that may have to leave, and its uses since it came (with a ceiling).

    Each queue is in the order of (priority, tick), the first leaving first. Ticks are given once and count
    events, not seconds: the order survives clocks that jump.
    """

    queue: int = 0
    priority: int = 0
    tick: int = 0
    uses: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        return self[:3]

    def pack(self) -> bytes:
        """Big endian, so that LMDB's key order is the order of leaving."""
        return _ORDER.pack(*self[:3])

    @classmethod
    def unpack(cls, order: bytes) -> Place:
        return cls(*_ORDER.unpack(order))


class Ghost(NamedTuple):
    """What is remembered of an entry that had to leave: its uses, and how many like it had left by then."""

    uses: int
    gone: int


@dataclass(slots=True)
class ShelfState:
    """What is known of all entries together.

    ``tick`` is the last one given; ``age`` the highest priority that has left, and ``gone`` how many have: those
    never used, and the others. ``lean`` is ``policies.CostAware``'s own.
    """

    tick: int = 0
    age: int = 0
    lean: int = 96
    gone: list[int] = field(default_factory=lambda: [0, 0])
    nbytes: list[int] = field(default_factory=lambda: [0] * QUEUES)

    def next_tick(self) -> int:
        self.tick += 1
        return self.tick

    def pack(self) -> bytes:
        # Below zero only while damage to the order of leaving waits to be reconciled.
        body = _STATE.pack(self.tick, self.age, self.lean, *self.gone, *(max(n, 0) for n in self.nbytes))
        return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, value: bytes) -> ShelfState | None:
        """The state, or None when the value does not match its own checksum."""
        body = value[:-8]
        if len(body) != _STATE.size or value[-8:] != _SUM.pack(xxhash.xxh3_64_intdigest(body)):
            return None
        tick, age, lean, *rest = _STATE.unpack(body)
        return cls(tick, age, lean, rest[:2], rest[2:])


class Row(NamedTuple):
    """One entry as the index knows it. ``nbytes`` is what the disk counts."""

    nbytes: int
    tokens: int
    layers: int
    created: float
    model: str
    context_tokens: int = 0
    place: Place = Place()
    flags: int = 0

    @property
    def cost(self) -> int:
        """Token-layers to compute for having the entry again: its context has to be prefilled, too."""
        return self.layers * (self.tokens + self.context_tokens)

    @property
    def foreign(self) -> bool:
        """Whether it was made of a file whose header is not for this version, and knows its size only."""
        return bool(self.flags & FOREIGN)

    def at(self, place: Place) -> Row:
        return self._replace(place=place)


def foreign_row(nbytes: int, created: float) -> Row:
    return Row(nbytes, 0, 0, created, "foreign", flags=FOREIGN)


def pack_row(key: bytes, row: Row) -> bytes:
    queue, priority, tick, uses = row.place
    fields = row.nbytes, priority, tick, row.created, row.tokens, row.context_tokens, row.layers, row.flags, queue, uses
    body = _ROW.pack(*fields) + row.model.encode()
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(key + body))


def unpack_row(key: bytes, value: bytes) -> Row | None:
    """The row, or None when the value does not match its own checksum."""
    body = value[:-8]
    if len(body) <= _ROW.size or value[-8:] != _SUM.pack(xxhash.xxh3_64_intdigest(key + body)):
        return None
    nbytes, priority, tick, created, tokens, context, layers, flags, queue, uses = _ROW.unpack_from(body)
    place = Place(queue, priority, tick, uses)
    return Row(nbytes, tokens, layers, created, body[_ROW.size :].decode(), context, place, flags)
