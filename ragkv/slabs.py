"""Slabs as a store hands them out, layer by layer, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ragkv.errors import CorruptEntryError, StoreError
from ragkv.plan import Span
from ragkv.store import LayerReader

Slabs = Iterator[list[np.ndarray | StoreError]]
"""For each layer, one uint8 slab per chunk, as stored."""


class ChunkLostError(Exception):
    """Chunks' stored KV turned out unreadable on the way; internal, answered by computing them.

    ``causes`` holds all that are lost in a layer: a remote tier that fails loses many at once. Whoever finds out about
    more adds them.
    """

    def __init__(self, causes: dict[Span, StoreError]) -> None:
        super().__init__("; ".join(map(str, causes.values())))
        self.causes = causes


def in_memory(slabs: Slabs) -> bool:
    """Whether asking for a layer never waits."""
    return isinstance(slabs, LayerReader) and slabs.in_memory


def next_layer(slabs: Slabs, spans: Sequence[Span], sizes: Sequence[int]) -> list[np.ndarray]:
    """The next layer's slabs, each of the right size.

    Raises:
        ChunkLostError: some are unreadable.
    """
    sound, lost = [], {}
    for span, slab, nbytes in zip(spans, next(slabs), sizes, strict=True):
        if isinstance(slab, StoreError):
            lost[span] = slab
        elif slab.nbytes != nbytes:
            lost[span] = CorruptEntryError("its slab has another size than the model's KV")
        else:
            sound.append(slab)
    if lost:
        raise ChunkLostError(lost)
    return sound
