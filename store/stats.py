"""What the store tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ragkv.store.remote import RemoteStats


class EntryInfo(NamedTuple):
    """What a look-up tells: the tier the entry would be read from, its tokens, and its bytes there."""

    tier: str
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot. Bytes are as the disk counts them; counts of events are this store object's own.

    ``models`` maps each model fingerprint in the store to its number of entries.
    """

    entries: int
    bytes: int
    capacity_bytes: int
    ram_entries: int
    ram_bytes: int
    ram_capacity_bytes: int
    hits_ram: int
    hits_ssd: int
    misses: int
    corrupt: int
    evictions: int
    models: dict[str, int] = field(default_factory=dict)
    hits_remote: int = 0
    remote: RemoteStats | None = None
