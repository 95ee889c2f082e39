"""From slabs to K and V: one layer of several chunks, gathered in a stage and unpacked on the device it was moved to.

In a stage every field of the codec (elements, scales) stands once, holding the rows of all chunks: so the bytes that
cross to the device are as few as those stored, and the number of operations there does not grow with the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ragkv.kv import KvShape
from ragkv.store import CODECS, Field

ALIGNMENT = 64
_HALF_OF_E4M3 = 256.0


class _Place(NamedTuple):
    """One field of all chunks in a stage."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Unpacker:
    """How chunks of ``lengths`` tokens, stored with ``codec``, stand in a stage.

    Attributes:
        slab_bytes: for each chunk, the bytes of its slab.
        pieces: for each chunk, which bytes of the stage take which bytes of its slab.
        nbytes: of a stage, a multiple of 64.
    """

    def __init__(self, codec: str, shape: KvShape, lengths: Sequence[int], device: torch.device) -> None:
        self._dtype, self._lengths = shape.dtype, list(lengths)
        forms = [CODECS[codec].fields(shape.geometry, length) for length in lengths]
        self.slab_bytes = [shape.slab_bytes(length, codec) for length in lengths]
        self.pieces: list[list[tuple[slice, slice]]] = [[] for _ in lengths]
        self._places: dict[str, _Place] = {}
        self.nbytes = 0
        for fields in zip(*forms, strict=True):
            self._add(fields)
        self._scaled = "key_scales" in self._places
        self._owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)

    def unpack(self, stage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each (tokens, kv_heads, head_dim), of a uint8 ``stage`` (nbytes,) on any device; views of it if
        the codec is ``raw``."""
        fields = {name: stage[p.start : p.end].view(p.dtype).view(p.shape) for name, p in self._places.items()}
        keys, values = fields["keys"], fields["values"]
        if not self._scaled:
            return keys, values
        return self._scale_keys(keys, fields["key_scales"]), self._scale(values, fields["value_scales"])

    def _add(self, fields: Sequence[Field]) -> None:
        """Give one field of every chunk its place, behind what is there."""
        first = fields[0]
        ends = list(accumulate((field.nbytes for field in fields), initial=self.nbytes))
        for pieces, field, start, end in zip(self.pieces, fields, ends[:-1], ends[1:], strict=True):
            pieces.append((slice(start, end), slice(field.offset, field.offset + field.nbytes)))
        rows = sum(field.shape[0] for field in fields)
        self._places[first.name] = _Place(self.nbytes, ends[-1], getattr(torch, first.dtype), (rows, *first.shape[1:]))
        self.nbytes = -(-ends[-1] // ALIGNMENT) * ALIGNMENT

    def _scale_keys(self, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``keys``, each times the scales of its chunk."""
        if len(scales) == 1:
            return self._scale(keys, scales)
        if keys.device.type != "cpu":
            return self._scale(keys, scales[self._owner])
        # A kernel costs nothing to start here, and the scales stay in the cache.
        out = torch.empty(keys.shape, dtype=self._dtype)
        for (start, end), scale in zip(pairwise(accumulate(self._lengths, initial=0)), scales, strict=True):
            self._scale(keys[start:end], scale, out[start:end])
        return out

    def _scale(self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Multiplied in float32 and rounded once, in one kernel."""
        if out is None:
            out = torch.empty(packed.shape, dtype=self._dtype, device=packed.device)
        if packed.dtype == torch.float8_e4m3fn:
            if packed.device.type == "cpu":
                packed, scales = _shrunk(packed), scales * _HALF_OF_E4M3
            else:
                packed = packed.to(torch.float16)
        return torch.mul(packed, scales, out=out)


def _shrunk(packed: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers ÷ 256 as float16: the same sign, exponent and mantissa bits in their places there.

    On a CPU torch converts float8 one by one, thirty times slower.
    """
    bits = packed.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
