"""Blocks of idle conversations on disk: raw, where they stood, so that coming back is exact.

A block is an entry of a :class:`~ragkv.store.ChunkStore` of its own, which verifies what it reads, holds its cap and
outlives the process. Reading and writing wait on threads here, never on the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from blake3 import blake3

from ragkv.errors import StoreError
from ragkv.lane import Lane
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.store import ChunkStore, OpenEntry

log = logging.getLogger("ragkv")


class Archive:
    """Keeps blocks of ``model`` in ``store``, which is closed with it.

    Attributes:
        reading: the thread that reads.
    """

    def __init__(self, store: ChunkStore, model: str) -> None:
        self._store, self._model = store, model
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ragkv-archive")
        self.reading = Lane("ragkv-archive-reader")
        self._tells = True

    def __contains__(self, name: bytes) -> bool:
        try:
            return self._key(name) in self._store
        except StoreError as error:
            self._tell(error)
            return False

    def keep(self, names: Sequence[bytes], memory: PagedKV, blocks: Sequence[int]) -> Future[None]:
        """Write ``blocks`` of ``memory`` under their names, as far as there is room. They must not change meanwhile."""
        return self._writer.submit(self._keep, list(names), memory, list(blocks))

    def fetch(self, names: Sequence[bytes], memory: PagedKV, blocks: Sequence[int]) -> Future[list[bool]]:
        """Read what is kept under ``names`` into ``blocks`` of ``memory``; says which came whole."""
        return self.reading.submit(len(names), partial(self._fetch, list(names), memory, list(blocks)))

    def close(self) -> None:
        """Finish what was asked for, and close the store."""
        self._writer.shutdown()
        self.reading.close()
        self._store.close()

    def _keep(self, names: list[bytes], memory: PagedKV, blocks: list[int]) -> None:
        geometry = memory.shape.geometry
        for name, block in zip(names, blocks, strict=True):
            slabs = memory.data[block].contiguous().view(torch.uint8).flatten(1).numpy()
            try:
                self._store.put(self._key(name), geometry, list(slabs), tokens=BLOCK_TOKENS, model=self._model)
            except StoreError as error:
                self._tell(error)

    def _tell(self, error: StoreError) -> None:
        """Once: a full disk would fill the log as well."""
        if self._tells:
            log.warning("KV of idle conversations is not kept on disk: %s", error)
        self._tells = False

    def _fetch(self, names: list[bytes], memory: PagedKV, blocks: list[int]) -> list[bool]:
        came = [False] * len(names)
        try:
            with ExitStack() as leases:
                entries = self._open(names, memory, leases)
                for i in entries:
                    came[i] = True
                for layer, slabs in enumerate(self._store.open_layers(list(entries.values())) if entries else ()):
                    for i, slab in zip(entries, slabs, strict=True):
                        came[i] &= self._place(memory, blocks[i], layer, slab)
        except StoreError as error:
            self._tell(error)
            return [False] * len(names)
        return came

    def _open(self, names: list[bytes], memory: PagedKV, leases: ExitStack) -> dict[int, OpenEntry]:
        """The entries of ``names`` that are there, by their number, as far as they are blocks of ``memory``."""
        right = (memory.shape.geometry, BLOCK_TOKENS, "raw")
        entries = {}
        for i, entry in enumerate(self._store.open([self._key(name) for name in names])):
            if isinstance(entry, OpenEntry):
                header = leases.enter_context(entry).header
                if (header.geometry, header.tokens, header.codec) == right:
                    entries[i] = entry
        return entries

    @staticmethod
    def _place(memory: PagedKV, block: int, layer: int, slab: np.ndarray | StoreError) -> bool:
        if isinstance(slab, StoreError):
            return False
        to = memory.data[block, layer]
        to.copy_(torch.from_numpy(slab.copy()).view(to.dtype).view(to.shape))
        return True

    def _key(self, name: bytes) -> bytes:
        return blake3(b"ragkv block\0" + self._model.encode() + b"\0" + name).digest()
