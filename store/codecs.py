"""How one layer's K and V stand in its slab: as the model has them, or in a byte per element.

The entry's header names the codec, and the codec's name fixes the layout: every field's place follows from the
geometry and the number of tokens. Scales stand in the layer's own slab, behind the elements, and not in the
header: so a layer can be read, verified and decoded alone, headers stay a block long, and a device can decode
straight from the bytes that were moved to it.

========== ======================== ====================================================================
codec      fields, in order         meaning
========== ======================== ====================================================================
``raw``    keys, values             (tokens, kv_heads, head_dim) each, little endian, in the KV's dtype
``int8``,  keys, values             (tokens, kv_heads, head_dim) each, one byte per element
``fp8``    key_scales               (1, kv_heads, head_dim) float32: one per channel
..         value_scales             (tokens, kv_heads, 1) float32: one per token and head
========== ======================== ====================================================================

An element is its byte (int8: a signed integer of -127 … 127; fp8: a float8_e4m3fn of -448 … 448) times its scale,
multiplied in float32 and rounded to the KV's dtype. Scales are the largest magnitude ÷ 127 or ÷ 448, and never so
large that this product overflows. Keys are scaled per channel because some of their channels are large for all
tokens, values per token because theirs are not (KIVI, Liu et al. 2024, https://arxiv.org/abs/2402.02750); RoPE would
mix the channels of a key, but keys are stored un-rotated. In ``raw`` values follow keys directly; in the others every
field begins on a multiple of 64 bytes, the bytes between them being zero. A slab ends with its last field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ragkv.errors import StoreFormatError
from ragkv.store.geometry import Geometry

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

ALIGNMENT = 64
BLOCK_ELEMENTS = 1 << 16
"""Elements worked on at a time, so that the float32 between two steps stays in the cache."""
SMALLEST = 2.0**-100
"""Channels whose largest magnitude is below are stored as zeros: their scale's inverse would overflow."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)

_DTYPES: dict[str, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float32": np.dtype(np.float32),
}


class Field(NamedTuple):
    """One array within a slab. ``dtype`` is the name that numpy (with ml_dtypes) and torch know it by."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Codec(Protocol):
    """Turns K and V of a layer, each (tokens, kv_heads, head_dim), into a slab and back.

    Implementations hold no state; ``name`` is what headers and chunk keys say, and fixes the layout for ever.
    """

    @property
    def name(self) -> str: ...

    def fields(self, geometry: Geometry, tokens: int) -> tuple[Field, ...]:
        """What stands where in a slab. Along its first axis a field has one row per token, or one in all."""
        ...

    def slab_bytes(self, geometry: Geometry, tokens: int) -> int:
        """Bytes of one layer's slab."""
        ...

    def encode(self, keys: Array, values: Array) -> tuple[Array, ...]:
        """The slab, in parts that follow each other in the file. They may be the arrays given.

        Raises:
            StoreFormatError: an infinite or NaN element, which this codec has no byte for.
        """
        ...

    def decode(self, slab: Bytes, geometry: Geometry, tokens: int) -> tuple[Array, Array]:
        """K and V in the geometry's dtype; they may be views of ``slab``."""
        ...


class Raw:
    """K and V as the model has them."""

    name = "raw"

    def fields(self, geometry: Geometry, tokens: int) -> tuple[Field, ...]:
        shape, half = (tokens, geometry.kv_heads, geometry.head_dim), geometry.slab_bytes(tokens) // 2
        return (
            Field("keys", geometry.dtype, shape, 0, half),
            Field("values", geometry.dtype, shape, half, half),
        )

    def slab_bytes(self, geometry: Geometry, tokens: int) -> int:
        return geometry.slab_bytes(tokens)

    def encode(self, keys: Array, values: Array) -> tuple[Array, ...]:
        return keys, values

    def decode(self, slab: Bytes, geometry: Geometry, tokens: int) -> tuple[Array, Array]:
        both = slab.view(geometry.numpy_dtype).reshape(2, tokens, geometry.kv_heads, geometry.head_dim)
        return both[0], both[1]


@dataclass(frozen=True)
class Scaled:
    """A byte per element, and scales.

    Args:
        dtype: of the bytes.
        limit: the largest magnitude a byte stands for.
        pack: writes float32 elements within the limit into bytes, rounding to nearest even; may spoil them.
        unpack: the inverse, exact.
    """

    name: str
    dtype: str
    limit: float
    pack: Callable[[NDArray[np.float32], Bytes], None]
    unpack: Callable[[Bytes, NDArray[np.float32]], None]

    @property
    def most(self) -> np.float32:
        """The largest scale that makes a finite float32 of the largest byte; rounding may have gone beyond."""
        scale = np.float32(_FLOAT32_MAX / self.limit)
        return scale if float(scale) * self.limit <= _FLOAT32_MAX else np.nextafter(scale, np.float32(0))

    def fields(self, geometry: Geometry, tokens: int) -> tuple[Field, ...]:
        heads, dim = geometry.kv_heads, geometry.head_dim
        wanted = (
            ("keys", self.dtype, (tokens, heads, dim)),
            ("values", self.dtype, (tokens, heads, dim)),
            ("key_scales", "float32", (1, heads, dim)),
            ("value_scales", "float32", (tokens, heads, 1)),
        )
        sizes = [math.prod(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in wanted]
        offsets = accumulate(map(_aligned, sizes), initial=0)
        return tuple(Field(*field, at, size) for field, at, size in zip(wanted, offsets, sizes, strict=False))

    def slab_bytes(self, geometry: Geometry, tokens: int) -> int:
        last = self.fields(geometry, tokens)[-1]
        return last.offset + last.nbytes

    def encode(self, keys: Array, values: Array) -> tuple[Array, ...]:
        tokens, heads, dim = keys.shape
        geometry = Geometry(1, heads, dim, keys.dtype.name)
        slab = np.zeros(self.slab_bytes(geometry, tokens), np.uint8)
        k, v, key_scales, value_scales = self._views(slab, geometry, tokens)
        for name, source, scales, target, axis in (
            ("keys", keys, key_scales, k, 0),
            ("values", values, value_scales, v, 2),
        ):
            largest = _largest(source, axis)
            if not np.isfinite(largest).all():
                raise StoreFormatError(f"the {name} hold inf or nan, which {self.name!r} cannot; store them as 'raw'")
            np.divide(largest, self.limit, out=scales, where=largest >= SMALLEST)
            np.minimum(scales, self.most, out=scales)
            inverse = np.divide(self.limit, largest, out=np.zeros_like(scales), where=largest >= SMALLEST)
            for part, block in _blocks(source):
                np.copyto(block, source[part])
                block *= _rows(inverse, part)
                self.pack(block, target[part].view(np.uint8))
        return (slab,)

    def decode(self, slab: Bytes, geometry: Geometry, tokens: int) -> tuple[Array, Array]:
        k, v, key_scales, value_scales = self._views(slab, geometry, tokens)
        decoded = np.empty((2, *k.shape), geometry.numpy_dtype)
        for source, scales, target in ((k, key_scales, decoded[0]), (v, value_scales, decoded[1])):
            for part, block in _blocks(source):
                self.unpack(source[part].view(np.uint8), block)
                block *= _rows(scales, part)
                np.copyto(target[part], block, casting="unsafe")
        return decoded[0], decoded[1]

    def _views(self, slab: Bytes, geometry: Geometry, tokens: int) -> list[Array]:
        return [
            slab[f.offset : f.offset + f.nbytes].view(_DTYPES[f.dtype]).reshape(f.shape)
            for f in self.fields(geometry, tokens)
        ]


def encode_slab(
    codec: str, geometry: Geometry, tokens: int, layer: int, parts: Sequence[memoryview]
) -> list[memoryview]:
    """One layer's slab from the bytes of its K and V, given in parts that follow each other.

    Raises:
        StoreFormatError: they are not as many as the geometry says, or the codec cannot hold them.
    """
    size, expected = sum(part.nbytes for part in parts), geometry.slab_bytes(tokens)
    if size != expected or layer >= geometry.layers:
        raise StoreFormatError(
            f"slab {layer} has {size} bytes; {tokens} tokens, {geometry} mean {geometry.layers} slabs of {expected}"
        )
    if codec == RAW.name:
        return list(parts)
    whole = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.uint8)
    try:
        encoded = CODECS[codec].encode(*RAW.decode(whole, geometry, tokens))
    except StoreFormatError as error:
        raise StoreFormatError(f"layer {layer}: {error.message}", layer=layer, codec=codec) from error
    return [part.reshape(-1).view(np.uint8).data for part in encoded]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _largest(array: Array, axis: int) -> NDArray[np.float32]:
    """The largest magnitude along ``axis``, which is kept; inf or nan where one of them is not finite.

    Without their sign, IEEE numbers are ordered as their bits are, with inf and nan above all; and integers are
    compared many at a time in every dtype.
    """
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    magnitude = array.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
    largest: NDArray[np.float32] = magnitude.max(axis, keepdims=True).view(array.dtype).astype(np.float32)
    return largest


def _blocks(array: Array) -> list[tuple[slice, NDArray[np.float32]]]:
    """Runs of tokens, each with float32 room for their elements: the same room again and again."""
    tokens, heads, dim = array.shape
    step = min(tokens, max(1, BLOCK_ELEMENTS // (heads * dim)))
    room = np.empty((step, heads, dim), np.float32)
    parts = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    return [(part, room[: part.stop - part.start]) for part in parts]


def _rows(scales: Array, part: slice) -> Array:
    return scales if len(scales) == 1 else scales[part]


def _pack_int8(floats: NDArray[np.float32], out: Bytes) -> None:
    np.rint(floats, out=floats)
    np.copyto(out.view(np.int8), floats, casting="unsafe")


def _unpack_int8(packed: Bytes, out: NDArray[np.float32]) -> None:
    np.copyto(out, packed.view(np.int8))


# ml_dtypes converts float8 one by one, ten times slower than this. A float32 times 2^-120 has the exponent that the
# same number has in e4m3, denormal ones included: sign, exponent and three bits of mantissa are its upper bits. (Of
# numbers below e4m3's smallest normal one it keeps what is above 2^-29, so a tie there may be seen that was none.)
_E4M3 = np.float32(2.0**-120)


def _pack_fp8(floats: NDArray[np.float32], out: Bytes) -> None:
    floats *= _E4M3
    bits = floats.view(np.int32)
    rounded = bits >> 20
    rounded &= 1
    rounded += bits
    rounded += 0x7FFFF
    rounded >>= 20
    np.copyto(out, rounded, casting="unsafe")
    bits >>= 24
    sign = bits.astype(np.uint8)
    sign &= 0x80
    out &= 0x7F
    out |= sign


def _unpack_fp8(packed: Bytes, out: NDArray[np.float32]) -> None:
    bits = out.view(np.int32)
    np.copyto(bits, packed.view(np.int8))  # its sign fills the upper bits
    bits <<= 20
    bits &= ~0x78000000
    out *= 1 / _E4M3


RAW = Raw()
CODECS: dict[str, Codec] = {
    "raw": RAW,
    "int8": Scaled("int8", "int8", 127.0, _pack_int8, _unpack_int8),
    "fp8": Scaled("fp8", "float8_e4m3fn", 448.0, _pack_fp8, _unpack_fp8),
}
