"""Layers' bytes as callers give them, on their way to the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.store.codecs import encode_slab
from ragkv.store.header import EntryHeader
from ragkv.store.ram import read_only

Part = bytes | bytearray | memoryview | NDArray[Any]
SlabInput = Part | tuple[Part, ...]
"""One layer's bytes: whole, or in parts such as ``(k, v)`` that are written one behind the other."""


def encoded(header: EntryHeader, slabs: Iterable[SlabInput]) -> Iterator[Sequence[memoryview]]:
    """Each slab as it will stand in the file, in parts; made when it is asked for."""
    for number, slab in enumerate(slabs):
        parts = [_as_bytes(part) for part in (slab if isinstance(slab, tuple) else (slab,))]
        yield encode_slab(header.codec, header.geometry, header.tokens, number, parts)


def _as_bytes(part: Part) -> memoryview:
    array = part if isinstance(part, np.ndarray) else np.frombuffer(part, np.uint8)
    return read_only(np.ascontiguousarray(array)).data
