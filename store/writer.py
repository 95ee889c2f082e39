"""How an entry gets into the store: space reserved, bytes written and synced, then its name and its row at once."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store.buffers import Array, Buffers
from ragkv.store.check import row_of
from ragkv.store.commit import GroupCommit
from ragkv.store.files import Folder
from ragkv.store.header import EntryHeader, aligned
from ragkv.store.index import Index
from ragkv.store.ranked import RankedExecutor
from ragkv.store.space import Space
from ragkv.store.temp import TempFile
from ragkv.store.txn import IndexTxn

Submit = Callable[[Callable[[], None]], Future[None]]

WRITE_BYTES = 8 << 20
"""What goes to the disk at once, if slabs are smaller."""
WRITES_AHEAD = 2
"""Per entry: one under way, and one to follow it while the next is being gathered."""


class EntryWriter:
    """Writes entries, of many threads at once.

    A thread copies its slabs into page-aligned buffers and takes their checksums there, while others write what
    has been copied: so neither the layout of the caller's memory nor what he does to it later matters.
    """

    def __init__(self, folder: Folder, index: Index, space: Space, buffers: Buffers, threads: int) -> None:
        self._folder = folder
        self._space = space
        self._buffers = buffers
        self._commits = GroupCommit(index)
        self._executor = RankedExecutor(threads, "ragkv-store-writer")
        self._age = itertools.count()

    def write(self, header: EntryHeader, slabs: Iterable[Sequence[memoryview]]) -> bool:
        """Store an entry durably, each slab given in parts. False if another was quicker.

        Raises:
            StoreFullError, StoreReadOnlyError: see ``ChunkStore.put``.
            StoreFormatError: the slabs are not as many, or as long, as the header says.
            CorruptEntryError: the header names checksums that the slabs do not match.
        """
        temp = TempFile(self._folder, header.key, header.file_bytes)
        try:
            self._commits.run(lambda txn: self._reserve(txn, temp, header))
            whole = self._fill(temp, header, slabs)
            temp.sync()
            fresh = self._commits.run(lambda txn: self._publish(txn, temp, whole), folder=temp.shard)
            temp.indexed = True
            return fresh
        finally:
            temp.discard()

    def close(self) -> None:
        self._executor.shutdown()

    def _reserve(self, txn: IndexTxn, temp: TempFile, header: EntryHeader) -> None:
        temp.discard()  # when run again, it must not be counted twice
        self._space.make(txn, header.file_bytes)
        temp.reserve()

    def _fill(self, temp: TempFile, header: EntryHeader, slabs: Iterable[Sequence[memoryview]]) -> EntryHeader:
        """The header with the checksums of what was written."""
        write = partial(self._executor.submit, next(self._age))
        gathered = _Gathered(temp, header, write, self._buffers)
        try:
            for parts in slabs:
                gathered.add(parts)
            whole = header.with_checksums(gathered.checksums)
            if len(whole.slabs) != header.geometry.layers:
                raise StoreFormatError(f"{len(whole.slabs)} slabs were given, {header.geometry} means another number")
            if header.slabs and header.slabs != whole.slabs:
                raise CorruptEntryError("a slab does not match its checksum", key=header.key.hex())
            gathered.flush()
        finally:
            gathered.settle()
        packed = np.frombuffer(whole.pack(), np.uint8)
        first = self._buffers.take(packed.nbytes)
        first[:] = packed
        temp.write(first, 0)
        return whole

    def _publish(self, txn: IndexTxn, temp: TempFile, header: EntryHeader) -> bool:
        if txn.get(header.key) is not None and os.path.exists(self._folder.entry_path(header.key)):
            return False
        self._space.make(txn, 0)  # the disk may count more than was reserved
        temp.publish()
        self._space.admit(txn, header.key, row_of(header, temp.nbytes))
        return True


class _Gathered:
    """Slabs one behind the other in a few large buffers, which threads write as they are full."""

    def __init__(self, temp: TempFile, header: EntryHeader, submit: Submit, buffers: Buffers) -> None:
        self.checksums: list[int] = []
        self._temp = temp
        self._header = header
        self._submit = submit
        self._buffers = buffers
        self._step = aligned(header.slab_bytes)
        self._slabs = min(max(1, WRITE_BYTES // self._step), header.geometry.layers)
        self._buffer: Array | None = None
        self._filled = 0
        self._offset = header.header_bytes
        self._writing: deque[Future[None]] = deque()

    def add(self, parts: Sequence[memoryview]) -> None:
        """Take the next slab."""
        header, number = self._header, len(self.checksums)
        size = sum(part.nbytes for part in parts)
        if size != header.slab_bytes or number == header.geometry.layers:
            raise StoreFormatError(
                f"slab {number} has {size} bytes; {header.tokens} tokens, {header.geometry} mean "
                f"{header.geometry.layers} slabs of {header.slab_bytes}"
            )
        if self._buffer is None:
            self._buffer = self._buffers.take(self._slabs * self._step)
        slab = self._buffer[self._filled : self._filled + self._step]
        at = 0
        for part in parts:
            slab[at : at + part.nbytes] = np.frombuffer(part, np.uint8)
            at += part.nbytes
        slab[size:] = 0  # the memory was somebody else's
        self.checksums.append(xxhash.xxh3_64_intdigest(slab[:size].data))
        self._filled += self._step
        if self._filled == self._buffer.nbytes:
            self._write()

    def flush(self) -> None:
        """Return when all of it is written."""
        self._write()
        while self._writing:
            self._writing.popleft().result()

    def settle(self) -> None:
        """Return when nothing is being written any more."""
        wait(self._writing)

    def _write(self) -> None:
        if self._buffer is None:
            return
        while len(self._writing) >= WRITES_AHEAD:
            self._writing.popleft().result()
        memory = self._buffer[: self._filled]
        self._writing.append(self._submit(partial(self._temp.write, memory, self._offset)))
        self._offset += self._filled
        self._buffer, self._filled = None, 0
