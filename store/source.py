"""Where an open entry's bytes come from: one small protocol, whatever the tier."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from ragkv.errors import StoreError
from ragkv.store.buffers import Array, Buffers
from ragkv.store.files import go_direct, read_into
from ragkv.store.header import BLOCK, EntryHeader
from ragkv.store.ram import Hold, RamEntry

OnReject = Callable[[bytes, int], None]

DIRECT_BYTES = 64 << 10
"""The smallest slab that is read past the page cache."""


class Source(Protocol):
    """One leased entry's slabs. The lease ends when it is closed, or when nothing refers to it any more.

    ``lane`` is where :meth:`slab` is called: threads of the tier's own, so that a slow tier holds up nobody
    else's reading; None if the slabs lie in memory, verified, and cost nothing to hand out.
    """

    @property
    def header(self) -> EntryHeader: ...

    @property
    def tier(self) -> str: ...

    @property
    def lane(self) -> Executor | None: ...

    def slab(self, layer: int, buffer: Array | None) -> Array:
        """The layer's bytes: ``buffer``, filled; without one an array of the store's, read-only if ``lane`` is None.

        Several layers may be asked for at once, in any order. It must return within the tier's own time limit
        and leave ``buffer`` alone afterwards. The reader verifies the bytes.

        Raises:
            CorruptEntryError: there are no such bytes any more; :meth:`reject` is then called.
            StoreError: they cannot be had now. Either way the entry's later layers are not asked for.
        """
        ...

    def reject(self) -> None:
        """The entry is wrong: nobody shall be given it again. Called once, on the lane or before any reading."""
        ...

    def share(self) -> Source:
        """The same entry under the same lease, to be closed on its own.

        Raises:
            StoreError: it is closed.
        """
        ...

    def close(self) -> None:
        """Give the lease back; closing twice is fine. No :meth:`slab` runs meanwhile."""
        ...


class Lease:
    """A descriptor whose kernel lock is an entry's lease, closed once nothing refers to it (see ``ram.Hold``)."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class RamSource:
    """An entry of the RAM tier, open while ``hold`` is kept.

    It has no lease on its file. A lease is there so that no bytes vanish while they are read, and so that no deleted
    file takes space that nobody counts, being open; neither can happen to what lies in memory. That what is open stays
    in the store, its own store sees to (``RamTier.let_go``). Another process, or another store object of this one, may
    delete or evict the file: then who has it open reads on, and nobody is given it again. A kernel lease would cost
    four system calls for each entry, which is most of what opening takes; and keeping it for as long as an entry is in
    RAM would keep every process from making room.
    """

    __slots__ = ("_hold", "_on_reject", "entry", "header")

    tier = "ram"
    lane = None

    def __init__(self, entry: RamEntry, hold: Hold, on_reject: Callable[[EntryHeader], None]) -> None:
        self.entry = entry
        self._hold: Hold | None = hold
        self.header = entry.header
        self._on_reject = on_reject

    def slab(self, layer: int, buffer: Array | None) -> Array:
        return self.entry.slabs[layer]

    def reject(self) -> None:
        self._on_reject(self.header)

    def share(self) -> RamSource:
        if self._hold is None:
            raise StoreError("the entry is closed; open it again", key=self.header.key.hex())
        return RamSource(self.entry, self._hold, self._on_reject)

    def close(self) -> None:
        self._hold = None


class FileSource:
    """An entry of the SSD tier, under a lease. ``on_reject`` takes its key and descriptor.

    Large slabs are read past the page cache: keeping what is used often is the RAM tier's business, and the
    kernel's copy would cost time and memory. Small ones are worth its reading ahead.
    """

    tier = "ssd"

    def __init__(
        self,
        header: EntryHeader,
        lease: Lease,
        lane: Executor,
        buffers: Buffers,
        on_reject: OnReject,
        direct: bool | None = None,
    ) -> None:
        self.header = header
        self.lane = lane
        self._lease: Lease | None = lease
        self._buffers = buffers
        self._on_reject = on_reject
        if direct is None:
            direct = header.slab_bytes >= DIRECT_BYTES and go_direct(lease.fd)
        self._direct = direct

    @property
    def held(self) -> Lease:
        """The lease. Raises StoreError: it was closed."""
        if self._lease is None:
            raise StoreError("the entry is closed; open it again", key=self.header.key.hex())
        return self._lease

    def slab(self, layer: int, buffer: Array | None) -> Array:
        if buffer is None:
            buffer = self._buffers.take(self.header.slabs[layer].nbytes)
        fd, offset = self.held.fd, self.header.slabs[layer].offset  # no name for the lease: an error would keep it
        if not self._direct:
            read_into(fd, buffer, offset)
        elif buffer.ctypes.data % BLOCK == 0:
            read_into(fd, buffer, offset, block=BLOCK)
        else:
            between = self._buffers.take(buffer.nbytes)
            read_into(fd, between, offset, block=BLOCK)
            np.copyto(buffer, between)
        return buffer

    def reject(self) -> None:
        self._on_reject(self.header.key, self.held.fd)

    def share(self) -> FileSource:
        return FileSource(self.header, self.held, self.lane, self._buffers, self._on_reject, self._direct)

    def close(self) -> None:
        self._lease = None
