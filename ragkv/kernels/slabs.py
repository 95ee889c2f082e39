"""From slabs on the device to layers of the KV: read, decoded, rotated and written in one launch.

The kernel reads through addresses: each slab may lie wherever it came to lie, alone in a tier or among others in a
stage. The device's memory is touched as little as can be: slabs read once, KV written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import next_power_of_2
from ragkv.kv import KvShape
from ragkv.store import CODECS

# Pairs of a program at a time, and its warps (tests/bench/loading.py).
BLOCK_PAIRS = 16
WARPS = 4
_CODEC = {"raw": 0, "int8": 1, "fp8": 2}
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_COLUMNS = ("tokens", "row", "slot", "values", "key_scales", "value_scales")


@triton.jit
def _decoded(stored, CODEC: tl.constexpr):
    if CODEC == 2:
        # e4m3's sign, exponent and mantissa bits in their places in a float16 are the number ÷ 256; a conversion
        # proper is not there on every chip.
        bits = (stored.to(tl.int16) << 7) & -16385
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit
def _field(base, offset, ELEMENT: tl.constexpr):
    return (base + offset).to(tl.pointer_type(ELEMENT))


# Compiled knowing that ``layer_stride`` is a multiple of 16: or else elements are stored one by one.
@triton.jit(do_not_specialize=["width"])
def _place(
    sources,
    spans,
    cos,
    sin,
    k,
    v,
    width,
    layer_stride,
    KV_HEADS: tl.constexpr,
    HD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    CODEC: tl.constexpr,
    ROTATED: tl.constexpr,
):
    # A pair is a token and a KV head. Decoded elements are rounded to the KV's dtype before they are rotated: so a
    # key is the same whichever way it was placed.
    chunk = tl.program_id(1)
    dtype = k.dtype.element_ty
    i = tl.arange(0, HALF_PAD)[None, :]
    j = tl.arange(0, REST_PAD)[None, :]
    layer = tl.program_id(2)
    base = tl.load(sources + layer * width + chunk)
    k += tl.cast(layer, tl.int64) * layer_stride
    v += tl.cast(layer, tl.int64) * layer_stride
    pairs = (tl.load(spans + chunk * 6) * KV_HEADS).to(tl.int32)
    row = tl.load(spans + chunk * 6 + 1)
    first_slot = tl.load(spans + chunk * 6 + 2)
    to_values = tl.load(spans + chunk * 6 + 3)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = pair < pairs
    token = pair // KV_HEADS
    held = alive[:, None] & (i < HALF)
    rest_held = alive[:, None] & (j < REST)
    place = (pair * HD)[:, None] + i
    rest_place = (pair * HD + 2 * HALF)[:, None] + j
    keys = _field(base, 0, ELEMENT) + place
    values = _field(base, to_values, ELEMENT) + place
    kx = tl.load(tl.multiple_of(keys, [ALIGN, ALIGN]), mask=held, other=0)
    ky = tl.load(tl.multiple_of(keys + HALF, [ALIGN, ALIGN]), mask=held, other=0)
    vx = tl.load(tl.multiple_of(values, [ALIGN, ALIGN]), mask=held, other=0)
    vy = tl.load(tl.multiple_of(values + HALF, [ALIGN, ALIGN]), mask=held, other=0)
    x = _decoded(kx, CODEC)
    y = _decoded(ky, CODEC)
    if CODEC != 0:
        channel = ((pair % KV_HEADS) * HD)[:, None]
        scales = _field(base, tl.load(spans + chunk * 6 + 4), tl.float32) + channel
        to_scale = _field(base, tl.load(spans + chunk * 6 + 5), tl.float32) + pair
        value_scale = tl.load(to_scale, mask=alive, other=0.0)[:, None]
        x = (x * tl.load(scales + i, mask=held, other=0.0)).to(dtype).to(tl.float32)
        y = (y * tl.load(scales + HALF + i, mask=held, other=0.0)).to(dtype).to(tl.float32)
    if ROTATED:
        angle = ((row + token) * HALF)[:, None] + i
        c = tl.load(cos + angle, mask=held, other=0.0)
        s = tl.load(sin + angle, mask=held, other=0.0)
        turned = x * c - y * s
        y = y * c + x * s
        x = turned
    target = ((first_slot + token) * STRIDE + (pair % KV_HEADS) * HEAD_STRIDE)[:, None]
    tl.store(k + target + i, x.to(dtype), mask=held)
    tl.store(k + target + HALF + i, y.to(dtype), mask=held)
    x = _decoded(vx, CODEC)
    y = _decoded(vy, CODEC)
    if CODEC != 0:
        x = x * value_scale
        y = y * value_scale
    tl.store(v + target + i, x.to(dtype), mask=held)
    tl.store(v + target + HALF + i, y.to(dtype), mask=held)
    if REST > 0:
        x = _decoded(tl.load(_field(base, 0, ELEMENT) + rest_place, mask=rest_held, other=0), CODEC)
        y = _decoded(tl.load(_field(base, to_values, ELEMENT) + rest_place, mask=rest_held, other=0), CODEC)
        if CODEC != 0:
            x = x * tl.load(scales + 2 * HALF + j, mask=rest_held, other=0.0)
            y = y * value_scale
        tl.store(k + target + 2 * HALF + j, x.to(dtype), mask=rest_held)
        tl.store(v + target + 2 * HALF + j, y.to(dtype), mask=rest_held)


def span_table(
    codec: str, shape: KvShape, lengths: Sequence[int], slots: Sequence[int], positions: Sequence[int]
) -> torch.Tensor:
    """What :class:`SlabPlacer` wants to know of some chunks, int64, on the host: of each its ``lengths`` in tokens, the
    first of its ``slots``, and the position of its first token."""
    offsets = {n: _offsets(codec, shape, n) for n in set(lengths)}
    table = np.column_stack([lengths, positions, slots, np.array([offsets[n] for n in lengths])])
    return torch.from_numpy(table.astype(np.int64))


class SlabPlacer:
    """Places chunks stored with ``codec``, each at consecutive slots, some layers at a time.

    Args:
        spans: :func:`span_table`, on the device.
        longest: tokens of the longest chunk.
        angles: :meth:`ragkv.rope.Rope.table`.
    """

    def __init__(
        self, codec: str, shape: KvShape, spans: torch.Tensor, longest: int, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._cos, self._sin = (part.contiguous() for part in angles)
        self._spans = spans
        self._grid = (-(-longest * shape.kv_heads // BLOCK_PAIRS), len(spans))
        half, hd = self._cos.shape[-1], shape.head_dim
        size = 1 if codec != "raw" else shape.dtype.itemsize
        self._rotary, self._plain = half, hd // 2
        self._fixed = {
            "KV_HEADS": shape.kv_heads,
            "HD": hd,
            "ELEMENT": _ELEMENTS[shape.dtype] if codec == "raw" else tl.int8,
            "BLOCK": BLOCK_PAIRS,
            "CODEC": _CODEC[codec],
        }
        self._align = {h: math.gcd(16, h * size, hd * size) for h in {self._rotary, self._plain}}

    def place(
        self, sources: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, rotated: bool, layer_stride: int = 0
    ) -> None:
        """Write some layers' keys, rotated unless these layers have no RoPE, and values.

        Args:
            sources: int64 (layers, at least chunks), where each chunk's slab begins: addresses of the device's
                memory, multiples of 16.
            k: (length, kv_heads, head_dim) of the first layer; v has its strides.
            layer_stride: elements from one layer to the next in the KV.
        """
        half = self._rotary if rotated else self._plain
        rest = self._fixed["HD"] - 2 * half
        _place[(*self._grid, len(sources))](
            sources,
            self._spans,
            self._cos,
            self._sin,
            k,
            v,
            sources.stride(0),
            layer_stride,
            HALF=half,
            HALF_PAD=next_power_of_2(half),
            REST=rest,
            REST_PAD=next_power_of_2(max(rest, 1)),
            STRIDE=k.stride(0),
            HEAD_STRIDE=k.stride(1),
            ALIGN=self._align[half],
            ROTATED=rotated,
            num_warps=WARPS,
            **self._fixed,
        )


def _offsets(codec: str, shape: KvShape, tokens: int) -> list[int]:
    """Where the columns begin in a slab, 0 for those that it does not have."""
    form = {field.name: field.offset for field in CODECS[codec].fields(shape.geometry, tokens)}
    return [form.get(name, 0) for name in _COLUMNS[3:]]
