"""Blocks of idle conversations on disk: raw, where they stood, so that coming back is exact.

A block is an entry of a :class:`~ragkv.store.ChunkStore` of its own, which verifies what it reads, holds its cap and
outlives the process. Reading and writing wait on threads here, never on the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
        opened = self._store.open([self._key(name) for name in names])
        came = [isinstance(entry, OpenEntry) and entry.header.geometry == memory.shape.geometry for entry in opened]
        there = [i for i, whole in enumerate(came) if whole]
        entries = [entry for entry in opened if isinstance(entry, OpenEntry)]
        try:
            readable = [entry for i in there if isinstance(entry := opened[i], OpenEntry)]
            for layer, slabs in enumerate(self._store.open_layers(readable) if readable else ()):
                for i, slab in zip(there, slabs, strict=True):
                    if isinstance(slab, np.ndarray):
                        self._place(memory, blocks[i], layer, slab)
                    else:
                        came[i] = False
        except StoreError as error:
            self._tell(error)
            return [False] * len(names)
        finally:
            for entry in entries:
                entry.close()
        return came

    @staticmethod
    def _place(memory: PagedKV, block: int, layer: int, slab: np.ndarray) -> None:
        to = memory.data[block, layer]
        to.copy_(torch.from_numpy(slab.copy()).view(to.dtype).view(to.shape))

    def _key(self, name: bytes) -> bytes:
        return blake3(b"ragkv block\0" + self._model.encode() + b"\0" + name).digest()
