"""Layerwise reading: layer i of every entry before layer i+1 of any, a few layers ahead of the caller."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from types import TracebackType

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, StoreError
from ragkv.store.files import disk_errors, read_into
from ragkv.store.header import BLOCK, EntryHeader
from ragkv.store.ram import Array, RamEntry, RamTier, read_only

Allocate = Callable[[int], Array]
SlabOrError = Array | CorruptEntryError


def aligned_empty(nbytes: int) -> Array:
    """An uninitialised uint8 array that begins on a page."""
    raw = np.empty(nbytes + BLOCK, np.uint8)
    start = -raw.ctypes.data % BLOCK
    return raw[start : start + nbytes]


class OpenEntry:
    """A leased entry: until ``close`` no thread and no process can evict or delete it.

    ``tier`` says where its bytes are: "ram" or "ssd". Closing twice is fine, and so is
    closing while the entry is being read.
    """

    def __init__(self, header: EntryHeader, fd: int, ram: RamEntry | None) -> None:
        self.header = header
        self.tier = "ssd" if ram is None else "ram"
        self._ram = ram
        self._fd = fd
        self._lock = threading.Lock()

    @property
    def key(self) -> bytes:
        return self.header.key

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def source(self) -> _Source:
        """What a reader needs; it shares the lease, and keeps it until it is done itself."""
        with self._lock:
            if self._fd < 0:
                raise StoreError("the entry is closed; open it again", key=self.key.hex())
            with disk_errors(self.key.hex()):
                return _Source(self.header, os.dup(self._fd), self._ram)

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            fd, self._fd, self._ram = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OpenEntry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class _Source:
    """One entry under reading: its open file, or its place in RAM, and what went wrong with it so far."""

    def __init__(self, header: EntryHeader, fd: int, ram: RamEntry | None) -> None:
        self.header = header
        self.fd = fd
        self.ram = ram
        self._failed: tuple[int, CorruptEntryError] | None = None
        self.reserved = 0
        self.kept: dict[int, Array] = {}
        self._lock = threading.Lock()

    def slab(self, layer: int, allocate: Allocate | None) -> SlabOrError:
        """The layer's bytes, verified unless they were in RAM already."""
        if self.ram is not None:
            return self.ram.slabs[layer]
        earlier = self.error_at(layer)
        if earlier is not None:
            return earlier
        try:
            return self._read(layer, allocate)
        except CorruptEntryError as error:
            error.context.update(key=self.header.key.hex(), layer=layer)
            return error

    def fail(self, layer: int, error: CorruptEntryError) -> bool:
        """Give up on the entry from ``layer`` on. True the first time: layers are read at once, in no order."""
        with self._lock:
            first = self._failed is None
            if self._failed is None or layer < self._failed[0]:
                self._failed = (layer, error)
        return first

    def error_at(self, layer: int) -> CorruptEntryError | None:
        """What the entry's layers from the first bad one on answer."""
        failed = self._failed
        return failed[1] if failed is not None and failed[0] <= layer else None

    @property
    def failed(self) -> bool:
        return self._failed is not None

    def _read(self, layer: int, allocate: Allocate | None) -> Array:
        nbytes = self.header.slabs[layer].nbytes
        if allocate is None:
            buffer = self._verified(layer, aligned_empty(nbytes))
            if self.reserved:
                self.kept[layer] = buffer
            return buffer
        given = allocate(nbytes)
        if given.shape != (nbytes,) or given.dtype != np.uint8:
            raise StoreError(f"allocate({nbytes}) must return a uint8 array of that size")
        if self.reserved:
            # RAM needs bytes of its own, verified where the caller cannot reach them.
            self.kept[layer] = self._verified(layer, aligned_empty(nbytes))
            given[:] = self.kept[layer]
        elif not self._fill(layer, given):
            # Good entries must not pay for a buffer that was handed out twice.
            self._verified(layer, aligned_empty(nbytes))
            raise StoreError("a buffer from allocate() was written to while it was being filled")
        return given

    def _verified(self, layer: int, buffer: Array) -> Array:
        if not self._fill(layer, buffer):
            raise CorruptEntryError("the slab does not match its checksum; encode its chunk again")
        return read_only(buffer)

    def _fill(self, layer: int, buffer: Array) -> bool:
        slab = self.header.slabs[layer]
        read_into(self.fd, buffer, slab.offset)
        return xxhash.xxh3_64_intdigest(buffer.data) == slab.checksum


class LayerReader(Iterator[list[SlabOrError]]):
    """Iterates over layers; see ``ChunkStore.open_layers``. Reading begins at once, stops with ``close``."""

    def __init__(
        self,
        entries: Sequence[OpenEntry],
        *,
        executor: Executor,
        lanes: int,
        depth: int,
        allocate: Allocate | None,
        ram: RamTier,
        on_corrupt: Callable[[CorruptEntryError, EntryHeader, int], None],
    ) -> None:
        self._sources: list[_Source] = []
        self._ahead: deque[list[Future[None]]] = deque()
        self._results: deque[list[SlabOrError | None]] = deque()
        self._executor = executor
        self._allocate = allocate
        self._ram = ram
        self._on_corrupt = on_corrupt
        self._next = 0
        counts = {entry.header.geometry.layers for entry in entries}
        if len(counts) > 1:
            raise StoreError(f"entries of different depth cannot be read together: {sorted(counts)} layers")
        self._layers = counts.pop() if counts else 0
        try:
            for entry in entries:
                self._sources.append(entry.source())
        except BaseException:
            self.close()
            raise
        self._lanes = self._spread(lanes)
        for _ in range(min(depth, self._layers)):
            self._submit()

    def __next__(self) -> list[SlabOrError]:
        if not self._ahead:
            self.close()
            raise StopIteration
        try:
            self._submit()
            futures, result = self._ahead[0], self._results[0]
            for future in futures:
                future.result()
        except BaseException:
            self.close()
            raise
        self._ahead.popleft()
        self._results.popleft()
        layer = self._next - len(self._ahead) - 1
        if not self._ahead:
            self._promote()
        return [self._answer(source, layer, slab) for source, slab in zip(self._sources, result, strict=True)]

    def close(self) -> None:
        """Stop reading. No buffer is written to afterwards."""
        running = [future for futures in self._ahead for future in futures if not future.cancel()]
        wait(running)
        self._ahead.clear()
        self._results.clear()
        sources, self._sources = self._sources, []
        for source in sources:
            os.close(source.fd)
            self._ram.release(source.reserved)

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_sources", None):
            self.close()

    def _spread(self, lanes: int) -> list[list[int]]:
        """Which sources each parallel task of a layer reads; and room in RAM for what may stay."""
        cold = [i for i, source in enumerate(self._sources) if source.ram is None]
        for i in cold:
            nbytes = self._sources[i].header.slab_bytes * self._layers
            if self._ram.reserve(nbytes):
                self._sources[i].reserved = nbytes
        return [lane for lane in (cold[i::lanes] for i in range(lanes)) if lane]

    def _submit(self) -> None:
        if self._next == self._layers:
            return
        layer, self._next = self._next, self._next + 1
        result: list[SlabOrError | None] = [
            source.slab(layer, None) if source.ram is not None else None for source in self._sources
        ]
        try:
            submit = self._executor.submit
            futures = [submit(self._read_lane, layer, lane, result) for lane in self._lanes]
        except RuntimeError as error:
            raise StoreError("the store was closed while its entries were being read") from error
        self._results.append(result)
        self._ahead.append(futures)

    def _read_lane(self, layer: int, lane: list[int], result: list[SlabOrError | None]) -> None:
        for i in lane:
            source = self._sources[i]
            answer = result[i] = source.slab(layer, self._allocate)
            if isinstance(answer, CorruptEntryError) and source.fail(layer, answer):
                self._on_corrupt(answer, source.header, source.fd)

    def _answer(self, source: _Source, layer: int, slab: SlabOrError | None) -> SlabOrError:
        # A later layer may have been read well before an earlier one failed.
        error = source.error_at(layer)
        if error is not None:
            return error
        if slab is None:
            raise StoreError("a layer was not read; this is a bug in ragkv", key=source.header.key.hex())
        return slab

    def _promote(self) -> None:
        for source in self._sources:
            if source.reserved and not source.failed:
                slabs = tuple(source.kept[layer] for layer in range(self._layers))
                self._ram.commit(source.header.key, RamEntry(source.header, slabs))
                source.reserved = 0
