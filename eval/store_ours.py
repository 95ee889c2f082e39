"""The chunk store and the raw device, as contenders in its measurement."""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path

from ragkv.errors import StoreError
from ragkv.eval.disk import BLOCK_BYTES, raw_read, raw_write
from ragkv.eval.store_load import PAGE, Bytes, Load, page_aligned
from ragkv.eval.store_peers import Contender
from ragkv.store import ChunkStore, OpenEntry, chunk_key
from ragkv.store.buffers import HUGE_PAGE, aligned_empty

PROMPT = 8
"""Chunks that are read together, layer by layer, as for one prompt."""

DEPTH = 2
"""Layers that are read ahead."""


class Raw(Contender):
    """The device itself: a file per chunk, direct I/O in large aligned blocks, as many requests in flight."""

    name = "raw"
    durable = "fsync of every file and of the folder, at the end"
    block = BLOCK_BYTES

    def write(self) -> float:
        return raw_write(self._paths(), self.load.entry_bytes, self.threads, self.block).seconds

    def read(self) -> float:
        return raw_read(self._paths(), self.threads, self.block).seconds

    def _paths(self) -> list[Path]:
        return [self.root / str(entry) for entry in range(self.load.entries)]


class RawWhole(Raw):
    """The same with a request per chunk, which the kernel cuts up itself: what the device gives at most."""

    name = "raw, whole chunks"

    def __init__(self, root: Path, load: Load, threads: int) -> None:
        super().__init__(root, load, threads)
        self.block = load.entry_bytes


class Ours(Contender):
    """``ragkv.store``, RAM tier off, read as a blend reads: a prompt's chunks layer by layer."""

    name = "ragkv"
    durable = "its own: put returns when file, folder and index are synced"
    verified = "every slab, and the header"

    def __init__(self, root: Path, load: Load, threads: int) -> None:
        super().__init__(root, load, threads)
        self._first_layer_s: list[float] = []
        self._keys = [_key(entry) for entry in range(load.entries)]
        self._buffers: deque[Bytes] = deque()

    def start(self) -> None:
        if not self._buffers:
            self._buffers.extend(_staging((DEPTH + 1) * PROMPT, self.load.slab_bytes))
        capacity = 2 * self.load.nbytes + (64 << 20)
        self._store = ChunkStore(self.root, capacity_bytes=capacity, ram_bytes=0, threads=self.threads)

    def write(self) -> None:
        self.each(self._write)

    def read(self) -> None:
        for first in range(0, self.load.entries, PROMPT):
            self._read_prompt(first)

    def stop(self) -> None:
        self._store.close()

    def figures(self) -> dict[str, float]:
        return {"first_layer_ms": 1000 * statistics.median(self._first_layer_s)}

    def _write(self, entry: int) -> None:
        load = self.load
        self._store.put(self._keys[entry], load.geometry, load.slabs(entry), tokens=load.tokens, model="measured")

    def _read_prompt(self, first: int) -> None:
        started = time.perf_counter()
        entries = [_opened(entry) for entry in self._store.open(self._keys[first : first + PROMPT])]
        with self._store.open_layers(entries, depth=DEPTH, allocate=self._allocate) as layers:
            for layer, slabs in enumerate(layers):
                for chunk, slab in enumerate(slabs, first):
                    if isinstance(slab, StoreError):
                        raise slab
                    self.load.arrived(chunk, layer, slab)
                    self._buffers.append(slab)
                if not layer:
                    self._first_layer_s.append(time.perf_counter() - started)
        for entry in entries:
            entry.close()

    def _allocate(self, nbytes: int) -> Bytes:
        try:
            return self._buffers.popleft()
        except IndexError:
            return page_aligned(nbytes)


def _staging(count: int, nbytes: int) -> list[Bytes]:
    """Buffers that are used again and again: one piece of huge pages, touched before the clock starts."""
    step = -(-nbytes // PAGE) * PAGE
    whole = aligned_empty(-(-count * step // HUGE_PAGE) * HUGE_PAGE)
    whole.fill(0)
    return [whole[i * step : i * step + nbytes] for i in range(count)]


def _opened(entry: OpenEntry | StoreError) -> OpenEntry:
    if isinstance(entry, StoreError):
        raise entry
    return entry


def _key(entry: int) -> bytes:
    return chunk_key(
        model="measured",
        tokenizer="none",
        dtype="bfloat16",
        codec="raw",
        context_policy="alone",
        context=[],
        tokens=[entry],
    )
