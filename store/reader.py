"""Layerwise reading: layer i of every entry before layer i+1 of any, a few layers ahead of the caller."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ragkv.errors import CorruptEntryError, StoreError
from ragkv.store.buffers import Allocate, Array
from ragkv.store.codecs import CODECS
from ragkv.store.header import EntryHeader
from ragkv.store.ram import RamEntry, RamTier, entry_bytes, read_only
from ragkv.store.source import RamSource, Source
from ragkv.store.traffic import Traffic

SlabOrError = Array | StoreError

TASK_BYTES = 256 << 10
"""Slabs smaller than this are read several to a task: handing a task to a thread costs as much as reading them."""


class OpenEntry:
    """An entry that can be read until ``close``, whatever happens to it meanwhile.

    ``tier`` says where its bytes are. From "ssd" it is leased: no thread and no process can evict or delete it. From
    "ram" its own store cannot; where another does, or another process, its bytes stay. Closing twice is fine, and so
    is closing while the entry is being read.
    """

    __slots__ = ("_lock", "_source", "header", "tier")

    def __init__(self, source: Source) -> None:
        self._source: Source | None = source
        self.header: EntryHeader = source.header
        self.tier: str = source.tier
        self._lock = threading.Lock()

    @property
    def key(self) -> bytes:
        return self.header.key

    @property
    def closed(self) -> bool:
        return self._source is None

    def decode(self, slab: Array) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V, each (tokens, kv_heads, head_dim) in the geometry's dtype, of one of the entry's slabs."""
        header = self.header
        return CODECS[header.codec].decode(slab, header.geometry, header.tokens)

    def source(self) -> Source:
        """What a reader needs; it shares the lease, and keeps it until it is done itself."""
        with self._lock:
            if self._source is None:
                raise StoreError("the entry is closed; open it again", key=self.key.hex())
            return self._source.share()

    def reject(self) -> None:
        """It is not what its key stands for: have nobody be given it again, and close it. Counts as corrupt."""
        with self._lock:
            source, self._source = self._source, None
        if source is not None:
            source.reject()
            source.close()

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            source, self._source = self._source, None
        if source is not None:
            source.close()

    def __enter__(self) -> OpenEntry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Reading:
    """One entry on its way to RAM, layers in ``order``: what of it stays there, and what went wrong with it so far."""

    def __init__(self, source: Source, lane: Executor, order: Sequence[int], allocate: Allocate | None) -> None:
        self.source, self.lane = source, lane
        self.header = source.header
        self.reserved = 0
        self.kept: dict[int, Array] = {}
        self._order, self._allocate = order, allocate
        self._failed: tuple[int, StoreError] | None = None
        self._lock = threading.Lock()

    @property
    def failed(self) -> bool:
        return self._failed is not None

    def slab(self, turn: int) -> SlabOrError:
        """The bytes of the layer whose turn it is, verified."""
        layer = self._order[turn]
        earlier = self.error_at(turn)
        if earlier is not None:
            return earlier
        given = self._given(layer)
        try:
            slab = self._own(layer) if given is None else self._into(given, layer)
        except StoreError as error:
            error.context.update(key=self.header.key.hex(), layer=layer)
            if self._fail(turn, error) and isinstance(error, CorruptEntryError):
                self.source.reject()
            return error
        if slab is None:
            raise StoreError("a buffer from allocate() was written to while it was being filled")
        return slab

    def error_at(self, turn: int) -> StoreError | None:
        """What the entry's layers answer from the turn of the first bad one on."""
        failed = self._failed
        return failed[1] if failed is not None and failed[0] <= turn else None

    def _given(self, layer: int) -> Array | None:
        if self._allocate is None:
            return None
        nbytes = self.header.slabs[layer].nbytes
        given = self._allocate(nbytes)
        if given.shape != (nbytes,) or given.dtype != np.uint8:
            raise StoreError(f"allocate({nbytes}) must return a uint8 array of that size")
        return given

    def _own(self, layer: int) -> Array:
        buffer = self.source.slab(layer, None)
        if not self._matches(layer, buffer):
            raise CorruptEntryError("the slab does not match its checksum; encode its chunk again")
        if self.reserved:
            self.kept[layer] = buffer
        return read_only(buffer)

    def _into(self, given: Array, layer: int) -> Array | None:
        """The layer in the caller's buffer; None if somebody else wrote to that meanwhile."""
        if self.reserved:
            # What stays in RAM needs bytes of its own, verified where the caller cannot reach them.
            np.copyto(given, self._own(layer))
        elif not self._matches(layer, self.source.slab(layer, given)):
            self._own(layer)  # good entries must not pay for a buffer that was handed out twice
            return None
        return given

    def _matches(self, layer: int, buffer: Array) -> bool:
        return xxhash.xxh3_64_intdigest(buffer.data) == self.header.slabs[layer].checksum

    def _fail(self, turn: int, error: StoreError) -> bool:
        """Give up on the entry from ``turn`` on. True the first time: several layers are read at once."""
        with self._lock:
            first = self._failed is None
            if self._failed is None or turn < self._failed[0]:
                self._failed = (turn, error)
        return first


class LayerReader(Iterator[list[SlabOrError]]):
    """Iterates over layers; see ``ChunkStore.open_layers``. Reading begins at once, stops with ``close``.

    ``traffic`` says, by tier, what was read so far (what lay in RAM was not), ``waited`` how many seconds the caller
    waited for it.
    """

    def __init__(
        self,
        entries: Sequence[OpenEntry],
        *,
        depth: int,
        allocate: Allocate | None,
        ram: RamTier,
        order: Sequence[int] | None = None,
    ) -> None:
        self._sources: list[Source] = []
        self._readings: dict[int, _Reading] = {}
        self._ahead: deque[list[Future[list[SlabOrError]]]] = deque()
        self._ram = ram
        self._next = 0
        self.traffic: dict[str, Traffic] = {}
        self.waited = 0.0
        counts = {entry.header.geometry.layers for entry in entries}
        if len(counts) > 1:
            raise StoreError(f"entries of different depth cannot be read together: {sorted(counts)} layers")
        self._layers = counts.pop() if counts else 0
        self._order = range(self._layers) if order is None or not entries else tuple(order)
        if sorted(self._order) != list(range(self._layers)):
            raise StoreError(f"order must name each of {self._layers} layers once, not {self._order}", setting="order")
        try:
            for entry in entries:
                self._sources.append(entry.source())
            for i, source in enumerate(self._sources):
                if source.lane is not None:
                    self._readings[i] = _Reading(source, source.lane, self._order, allocate)
            self._tasks = self._spread()
            self.traffic = {self._readings[task[0]].source.tier: Traffic() for _, task in self._tasks}
            for _ in range(min(depth, self._layers)):
                self._submit()
        except BaseException:
            self.close()
            raise

    def __next__(self) -> list[SlabOrError]:
        if not self._ahead:
            self.close()
            raise StopIteration
        try:
            self._submit()
            turn = self._next - len(self._ahead)
            began = time.perf_counter()
            found = [future.result() for future in self._ahead[0]]
            self.waited += time.perf_counter() - began
        except BaseException:
            self.close()
            raise
        self._ahead.popleft()
        if not self._ahead:
            self._promote()
        return self._in_order(turn, found)

    def close(self) -> None:
        """Stop reading. No buffer is written to afterwards."""
        running = [future for futures in self._ahead for future in futures if not future.cancel()]
        if running:
            wait(running)
        self._ahead.clear()
        sources, self._sources = self._sources, []
        readings, self._readings = self._readings, {}
        for source in sources:
            source.close()
        for reading in readings.values():
            self._ram.release(reading.reserved)

    def __enter__(self) -> LayerReader:
        return self

    @property
    def in_memory(self) -> bool:
        """All of it lies in RAM: nothing is read, and asking for a layer never waits."""
        return not self._tasks

    def lying(self, sizes: Sequence[int]) -> list[RamEntry] | None:
        """The entries, whose slabs lie where they say; None unless all are in RAM and have these ``sizes``, one for
        each entry. They stay there until the reader is closed, and whoever reads them so need not ask for layers."""
        entries = [source.entry for source in self._sources if isinstance(source, RamSource)]
        if len(entries) != len(self._sources) or [entry.slab_bytes for entry in entries] != list(sizes):
            return None
        return entries or None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_sources", None):
            self.close()

    def _spread(self) -> list[tuple[Executor, list[int]]]:
        """What each task of a layer reads, in the order of the entries; and room in RAM for what may stay."""
        tasks: list[tuple[Executor, list[int]]] = []
        open_tasks: dict[Executor, tuple[int, list[int]]] = {}
        for i, reading in self._readings.items():
            lane = reading.lane
            nbytes = entry_bytes(slab.nbytes for slab in reading.header.slabs)
            if self._ram.reserve(nbytes):
                reading.reserved = nbytes
            filled, task = open_tasks.get(lane, (TASK_BYTES, []))
            if filled >= TASK_BYTES:
                filled, task = 0, []
                tasks.append((lane, task))
            task.append(i)
            open_tasks[lane] = (filled + nbytes // self._layers, task)
        return tasks

    def _submit(self) -> None:
        if self._next == self._layers:
            return
        turn, self._next = self._next, self._next + 1
        self._ahead.append([])
        try:
            for lane, task in self._tasks:
                self._ahead[-1].append(lane.submit(self._read, turn, task))
        except RuntimeError as error:
            raise StoreError("the store was closed while its entries were being read") from error

    def _read(self, turn: int, task: list[int]) -> list[SlabOrError]:
        readings, layer = [self._readings[i] for i in task], self._order[turn]
        with self.traffic[readings[0].source.tier].reading(sum(one.header.slabs[layer].nbytes for one in readings)):
            return [one.slab(turn) for one in readings]

    def _in_order(self, turn: int, found: list[list[SlabOrError]]) -> list[SlabOrError]:
        cold = {
            i: slab
            for (_, task), slabs in zip(self._tasks, found, strict=True)
            for i, slab in zip(task, slabs, strict=True)
        }
        # A later layer may have been read well before an earlier one failed.
        return [
            (self._readings[i].error_at(turn) or cold[i]) if i in cold else source.slab(self._order[turn], None)
            for i, source in enumerate(self._sources)
        ]

    def _promote(self) -> None:
        for reading in self._readings.values():
            if reading.reserved and not reading.failed:
                slabs = tuple(read_only(reading.kept[layer]) for layer in range(self._layers))
                self._ram.commit(reading.header.key, RamEntry(reading.header, slabs))
                reading.reserved = 0
