"""An entry on the remote tier, as a reader sees it."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np

from ragkv.errors import StoreError
from ragkv.store.buffers import Array, Buffers
from ragkv.store.header import EntryHeader

if TYPE_CHECKING:
    from ragkv.store.remote.client import Remote


class RemoteSource:
    """A :class:`~ragkv.store.source.Source` that no lease protects: the object may vanish while it is read.

    What a reader fetched of it is kept, if the budget for promotions allows, and handed over at the end. It is
    received in ``buffers``, whose memory is not lent again before a transfer that nobody waits for any more ends.
    """

    tier = "remote"

    def __init__(self, header: EntryHeader, remote: Remote, buffers: Buffers, *, keep: bool = False) -> None:
        self.header = header
        self._remote, self._buffers = remote, buffers
        self._closed = self._rejected = False
        self._kept: dict[int, Array] | None = {} if keep else None

    @property
    def lane(self) -> Executor:
        return self._remote.lane

    def slab(self, layer: int, buffer: Array | None) -> Array:
        fetched = self._buffers.take(self.header.slabs[layer].nbytes)
        self._remote.fetch(self.header, layer, fetched)
        if self._kept is not None:
            self._kept[layer] = fetched
        if buffer is None:
            return fetched
        np.copyto(buffer, fetched)
        return buffer

    def reject(self) -> None:
        self._rejected = True
        self._remote.expel(self.header.key)

    def share(self) -> RemoteSource:
        if self._closed:
            raise StoreError("the entry is closed; open it again", key=self.header.key.hex())
        return RemoteSource(self.header, self._remote, self._buffers, keep=self._remote.may_promote(self.header))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        kept, self._kept = self._kept, None
        if kept is not None:
            layers = range(self.header.geometry.layers)
            whole = not self._rejected and len(kept) == len(layers)
            self._remote.promote(self.header, [kept[layer] for layer in layers] if whole else None)
