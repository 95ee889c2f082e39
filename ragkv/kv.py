"""The KV cache that a prefill works in: one piece, in the order of the prompt.

Loading, repairing and long attention want it so. What came of it moves into blocks of the pool once, when the prompt
stands, which costs a thousandth of computing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ragkv.store import CODECS, Geometry


@dataclass(frozen=True)
class KvShape:
    """Shape of one token's KV: what a request or a stored chunk needs to know of the model."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @cached_property
    def geometry(self) -> Geometry:
        """The same shape as the chunk store knows it."""
        return Geometry(self.layers, self.kv_heads, self.head_dim, str(self.dtype).removeprefix("torch."))

    def entry_bytes(self, tokens: int, codec: str) -> int:
        """Bytes of the KV of a chunk of ``tokens`` tokens, stored with ``codec``."""
        return self.layers * self.slab_bytes(tokens, codec)

    def slab_bytes(self, tokens: int, codec: str) -> int:
        """The same of one layer."""
        return _slab_bytes(self.geometry, tokens, codec)


@lru_cache(1024)  # a prompt asks for each of its chunks, which are mostly of one length
def _slab_bytes(geometry: Geometry, tokens: int, codec: str) -> int:
    return CODECS[codec].slab_bytes(geometry, tokens)


class RequestKV:
    """Keys and values of one prompt, all layers, slot ``j`` holding position ``base + j``: where a prefill works.

    Owned by the prefill, whose result is copied into blocks of the pool; only the thread that owns the model touches
    it.
    Slots hold whatever was written last: reading a slot nobody wrote is a bug of the caller, whose masks
    must exclude it.
    """

    def __init__(self, shape: KvShape, capacity: int, device: torch.device, base: int = 0) -> None:
        self.shape, self.capacity, self.base = shape, capacity, base
        self._data = torch.empty(
            (shape.layers, 2, capacity, shape.kv_heads, shape.head_dim), dtype=shape.dtype, device=device
        )

    def first(self, capacity: int) -> RequestKV:
        """The first ``capacity`` slots, in the same memory."""
        part = object.__new__(RequestKV)
        part.shape, part.capacity, part.base = self.shape, capacity, self.base
        part._data = self._data[:, :, :capacity]
        return part

    def slot(self, positions: torch.Tensor) -> torch.Tensor:
        """Where ``positions`` stand; the same tensor where that is the same."""
        return positions - self.base if self.base else positions

    def write(self, layer: int, slots: torch.Tensor | slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store rows of rotated ``keys`` and ``values``, each (n, kv_heads, head_dim), at ``slots``."""
        self._data[layer, 0, slots] = keys
        self._data[layer, 1, slots] = values

    def write_layers(self, first: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Store ``kv``, which broadcasts to (layers, 2, n, kv_heads, head_dim), at ``slots`` of layers ``first …``."""
        self._data[first : first + len(kv), :, slots] = kv

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first ``length`` slots: keys, values, each (length, kv_heads, head_dim)."""
        return self._data[layer, 0, :length], self._data[layer, 1, :length]

    @property
    def layer_stride(self) -> int:
        """Elements from one layer to the next."""
        return self._data.stride(0)

    def slots(self, first: int, end: int) -> torch.Tensor:
        """View of slots ``first … end - 1`` of all layers: (layers, 2, slots, kv_heads, head_dim)."""
        return self._data[:, :, first:end]


@dataclass(frozen=True)
class Known:
    """The first ``tokens`` tokens of a prompt, whose KV ``fill`` writes into the first slots of a prefill's KV."""

    tokens: int = 0
    fill: Callable[[RequestKV], None] = lambda _: None


NOTHING = Known()
