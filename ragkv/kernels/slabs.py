"""From slabs where they lie to some layers of the KV: read, decoded, rotated and written in one launch.

The kernel reads through addresses, so a slab may lie on the device or in page-locked memory of the host: then the bytes
cross the link as the kernel asks for them, and touch the device's memory once, as KV. A link is slow, so that a few
programs with much under way each keep it busy, and leave the other multiprocessors to whoever computes meanwhile.
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
from ragkv.uploading import uploaded

# Programs, by whether a byte is an element: the fewest that keep a link of 55 GB/s busy on an H200
# (tests/bench/loading.py).
WORKERS = {False: 4, True: 16}
BLOCK_PAIRS = 128
WARPS = 16
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
def _halves(rows, BLOCK: tl.constexpr, HALF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(rows, (BLOCK, 2, HALF)), (0, 2, 1)))


@triton.jit
def _field(base, offset, ELEMENT: tl.constexpr):
    return (base + offset).to(tl.pointer_type(ELEMENT))


# Compiled knowing that ``layer_stride`` is a multiple of 16: or else elements are stored one by one.
@triton.jit(do_not_specialize=["chunks", "layers", "width"])
def _place(
    sources,
    copies,
    spans,
    cos,
    sin,
    k,
    v,
    chunks,
    layers,
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
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # A pair is a token and a KV head. Decoded elements are rounded to the KV's dtype before they are rotated: so a
    # key is the same whichever way it was placed.
    workers = tl.num_programs(0)
    dtype = k.dtype.element_ty
    i = tl.arange(0, HALF_PAD)[None, :]
    j = tl.arange(0, REST_PAD)[None, :]
    for step in range(layers * chunks):
        layer = step // chunks
        chunk = step % chunks
        base = tl.load(sources + layer * width + chunk)
        to_layer = tl.cast(layer, tl.int64) * layer_stride
        k_here = k + to_layer
        v_here = v + to_layer
        row = tl.load(spans + chunk * 6 + 1)
        first_slot = tl.load(spans + chunk * 6 + 2)
        to_values = tl.load(spans + chunk * 6 + 3)
        pairs = (tl.load(spans + chunk * 6) * KV_HEADS).to(tl.int32)
        if COPIED:
            copy = tl.load(copies + layer * width + chunk)
        # Chunks that do not fill all programs begin with another one each.
        start = ((tl.program_id(0) + chunk) % workers) * BLOCK
        for first in range(start, pairs, workers * BLOCK):
            pair = first + tl.arange(0, BLOCK)
            alive = pair < pairs
            token = pair // KV_HEADS
            held = alive[:, None] & (i < HALF)
            rest_held = alive[:, None] & (j < REST)
            place = (pair * HD)[:, None] + i
            rest_place = (pair * HD + 2 * HALF)[:, None] + j
            keys = _field(base, 0, ELEMENT) + place
            values = _field(base, to_values, ELEMENT) + place
            if WHOLE:
                # A link carries few long requests better than many short ones: whole rows, cut in two on the chip.
                row_of = (pair * HD)[:, None] + tl.arange(0, HD)[None, :]
                keys = tl.multiple_of(_field(base, 0, ELEMENT) + row_of, [ALIGN, ALIGN])
                values = tl.multiple_of(_field(base, to_values, ELEMENT) + row_of, [ALIGN, ALIGN])
                kx, ky = _halves(tl.load(keys, mask=alive[:, None], other=0), BLOCK, HALF)
                vx, vy = _halves(tl.load(values, mask=alive[:, None], other=0), BLOCK, HALF)
            else:
                kx = tl.load(tl.multiple_of(keys, [ALIGN, ALIGN]), mask=held, other=0)
                ky = tl.load(tl.multiple_of(keys + HALF, [ALIGN, ALIGN]), mask=held, other=0)
                vx = tl.load(tl.multiple_of(values, [ALIGN, ALIGN]), mask=held, other=0)
                vy = tl.load(tl.multiple_of(values + HALF, [ALIGN, ALIGN]), mask=held, other=0)
            if REST > 0:
                kz = tl.load(_field(base, 0, ELEMENT) + rest_place, mask=rest_held, other=0)
                vz = tl.load(_field(base, to_values, ELEMENT) + rest_place, mask=rest_held, other=0)
            if CODEC != 0:
                to_key_scales = tl.load(spans + chunk * 6 + 4)
                to_value_scales = tl.load(spans + chunk * 6 + 5)
                channel = ((pair % KV_HEADS) * HD)[:, None]
                scales = _field(base, to_key_scales, tl.float32) + channel
                sx = tl.load(scales + i, mask=held, other=0.0)
                sy = tl.load(scales + HALF + i, mask=held, other=0.0)
                sv = tl.load(_field(base, to_value_scales, tl.float32) + pair, mask=alive, other=0.0)
                if REST > 0:
                    sz = tl.load(scales + 2 * HALF + j, mask=rest_held, other=0.0)
            if COPIED:  # noqa: SIM102  (`copy` is there only then)
                if copy != 0:
                    to = _field(copy, 0, ELEMENT) + place
                    tl.store(tl.multiple_of(to, [ALIGN, ALIGN]), kx, mask=held)
                    tl.store(tl.multiple_of(to + HALF, [ALIGN, ALIGN]), ky, mask=held)
                    to = _field(copy, to_values, ELEMENT) + place
                    tl.store(tl.multiple_of(to, [ALIGN, ALIGN]), vx, mask=held)
                    tl.store(tl.multiple_of(to + HALF, [ALIGN, ALIGN]), vy, mask=held)
                    if REST > 0:
                        tl.store(_field(copy, 0, ELEMENT) + rest_place, kz, mask=rest_held)
                        tl.store(_field(copy, to_values, ELEMENT) + rest_place, vz, mask=rest_held)
                    if CODEC != 0:
                        # Every program writes the keys' scales it has read: the same ones.
                        to_scales = _field(copy, to_key_scales, tl.float32) + channel
                        tl.store(to_scales + i, sx, mask=held)
                        tl.store(to_scales + HALF + i, sy, mask=held)
                        tl.store(_field(copy, to_value_scales, tl.float32) + pair, sv, mask=alive)
                        if REST > 0:
                            tl.store(to_scales + 2 * HALF + j, sz, mask=rest_held)

            target = ((first_slot + token) * STRIDE + (pair % KV_HEADS) * HEAD_STRIDE)[:, None]
            x = _decoded(kx, CODEC)
            y = _decoded(ky, CODEC)
            if CODEC != 0:
                x = (x * sx).to(dtype).to(tl.float32)
                y = (y * sy).to(dtype).to(tl.float32)
            if ROTATED:
                angle = ((row + token) * HALF)[:, None] + i
                c = tl.load(cos + angle, mask=held, other=0.0)
                s = tl.load(sin + angle, mask=held, other=0.0)
                turned = x * c - y * s
                y = y * c + x * s
                x = turned
            tl.store(k_here + target + i, x.to(dtype), mask=held)
            tl.store(k_here + target + HALF + i, y.to(dtype), mask=held)
            x = _decoded(vx, CODEC)
            y = _decoded(vy, CODEC)
            if CODEC != 0:
                x = x * sv[:, None]
                y = y * sv[:, None]
            tl.store(v_here + target + i, x.to(dtype), mask=held)
            tl.store(v_here + target + HALF + i, y.to(dtype), mask=held)
            if REST > 0:
                x = _decoded(kz, CODEC)
                y = _decoded(vz, CODEC)
                if CODEC != 0:
                    x = x * sz
                    y = y * sv[:, None]
                tl.store(k_here + target + 2 * HALF + j, x.to(dtype), mask=rest_held)
                tl.store(v_here + target + 2 * HALF + j, y.to(dtype), mask=rest_held)


class SlabPlacer:
    """Places layers of chunks stored with ``codec``, each at consecutive slots.

    Attributes:
        slab_bytes: of each chunk.

    Args:
        lengths: tokens of each chunk.
        slots: the first slot of each.
        angles: float32 cos and sin of :meth:`ragkv.rope.Rope.angles` for the chunks' tokens, one after the other.
    """

    def __init__(
        self,
        codec: str,
        shape: KvShape,
        lengths: Sequence[int],
        slots: Sequence[int],
        angles: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        forms = [{f.name: f for f in CODECS[codec].fields(shape.geometry, n)} for n in lengths]
        rows = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        offsets = [[form[name].offset if name in form else 0 for name in _COLUMNS[3:]] for form in forms]
        self.slab_bytes = [CODECS[codec].slab_bytes(shape.geometry, n) for n in lengths]
        table = np.column_stack([lengths, rows, slots, np.array(offsets).reshape(len(lengths), 3)])
        self._cos, self._sin = (part.contiguous() for part in angles)
        self._device = self._cos.device
        self._spans = uploaded(torch.from_numpy(table.astype(np.int64)), self._device)
        self._chunks = len(lengths)
        half, hd = self._cos.shape[-1], shape.head_dim
        size = 1 if codec != "raw" else shape.dtype.itemsize
        self._rotary, self._plain, self._element_bytes = half, hd // 2, size
        self._fixed = {
            "KV_HEADS": shape.kv_heads,
            "HD": hd,
            "ELEMENT": _ELEMENTS[shape.dtype] if codec == "raw" else tl.int8,
            "BLOCK": BLOCK_PAIRS,
            "CODEC": _CODEC[codec],
        }
        self._align = {h: math.gcd(16, h * size, hd * size) for h in {self._rotary, self._plain}}

    def place(
        self,
        sources: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        rotated: bool,
        copies: torch.Tensor | None = None,
        layer_stride: int = 0,
        workers: int | None = None,
    ) -> None:
        """Write some layers' keys, rotated unless these layers have no RoPE, and values.

        Args:
            sources: int64 (layers, at least chunks), where each chunk's slab begins: addresses the device can read,
                multiples of 16. Like ``copies`` it may be page-locked memory of the host itself.
            k: (length, kv_heads, head_dim) of the first layer; v has its strides.
            copies: where to put each slab as it is, besides, in the form of ``sources``; 0: nowhere.
            layer_stride: elements from one layer to the next in the KV.
        """
        half = self._rotary if rotated else self._plain
        rest = self._fixed["HD"] - 2 * half
        _place[(workers or WORKERS[self._element_bytes == 1],)](
            sources,
            sources if copies is None else copies,
            self._spans,
            self._cos,
            self._sin,
            k,
            v,
            self._chunks,
            len(sources),
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
            COPIED=copies is not None,
            WHOLE=2 * half == self._fixed["HD"] and self._element_bytes == 1 and half == next_power_of_2(half),
            num_warps=WARPS,
            **self._fixed,
        )
