"""From a stage of stored chunks to a layer of the KV: decoded, rotated and scattered in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import check_kv, next_power_of_2

BLOCK_PAIRS = 32
RAW, INT8, FP8 = 0, 1, 2


@triton.jit
def _element(stored, CODEC: tl.constexpr):
    if CODEC == 2:
        # e4m3's sign, exponent and mantissa bits in their places in a float16 are the number ÷ 256; a conversion
        # proper is not there on every chip.
        bits = (stored.to(tl.int16) << 7) & -16385
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return stored.to(tl.float32)


@triton.jit(do_not_specialize=["pairs"])
def _place(
    keys,
    values,
    key_scales,
    value_scales,
    owner,
    cos,
    sin,
    slots,
    k,
    v,
    pairs,
    KV_HEADS: tl.constexpr,
    HD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODEC: tl.constexpr,
    ROTATED: tl.constexpr,
):
    # A pair is a token and a KV head. Decoded elements are rounded to the KV's dtype before they are rotated: so a
    # key is the same whichever way it was placed.
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = pair < pairs
    token = pair // KV_HEADS
    head = pair % KV_HEADS
    i = tl.arange(0, HALF_PAD)
    j = tl.arange(0, REST_PAD)
    held = alive[:, None] & (i < HALF)[None, :]
    rest_held = alive[:, None] & (j < REST)[None, :]
    dtype = k.dtype.element_ty
    slot = tl.load(slots + token, mask=alive, other=0)
    source = pair[:, None] * HD + i[None, :]
    rest_source = pair[:, None] * HD + 2 * HALF + j[None, :]
    target = (slot * STRIDE + head * HEAD_STRIDE)[:, None] + i[None, :]
    rest_target = (slot * STRIDE + head * HEAD_STRIDE + 2 * HALF)[:, None] + j[None, :]

    x = _element(tl.load(keys + source, mask=held, other=0), CODEC)
    y = _element(tl.load(keys + source + HALF, mask=held, other=0), CODEC)
    if CODEC != 0:
        scales = key_scales + (tl.load(owner + token, mask=alive, other=0) * KV_HEADS + head)[:, None] * HD
        x = (x * tl.load(scales + i[None, :], mask=held, other=0.0)).to(dtype).to(tl.float32)
        y = (y * tl.load(scales + HALF + i[None, :], mask=held, other=0.0)).to(dtype).to(tl.float32)
    if ROTATED:
        c = tl.load(cos + token[:, None] * HALF + i[None, :], mask=held, other=0.0)
        s = tl.load(sin + token[:, None] * HALF + i[None, :], mask=held, other=0.0)
        turned = x * c - y * s
        y = y * c + x * s
        x = turned
    tl.store(k + target, x.to(dtype), mask=held)
    tl.store(k + target + HALF, y.to(dtype), mask=held)
    if REST > 0:
        z = _element(tl.load(keys + rest_source, mask=rest_held, other=0), CODEC)
        if CODEC != 0:
            z = z * tl.load(scales + 2 * HALF + j[None, :], mask=rest_held, other=0.0)
        tl.store(k + rest_target, z.to(dtype), mask=rest_held)

    x = _element(tl.load(values + source, mask=held, other=0), CODEC)
    y = _element(tl.load(values + source + HALF, mask=held, other=0), CODEC)
    if CODEC != 0:
        factor = tl.load(value_scales + pair, mask=alive, other=0.0)[:, None]
        x = x * factor
        y = y * factor
    tl.store(v + target, x.to(dtype), mask=held)
    tl.store(v + target + HALF, y.to(dtype), mask=held)
    if REST > 0:
        z = _element(tl.load(values + rest_source, mask=rest_held, other=0), CODEC)
        if CODEC != 0:
            z = z * factor
        tl.store(v + rest_target, z.to(dtype), mask=rest_held)


def place(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    owner: torch.Tensor | None = None,
) -> None:
    """Write stored chunks' keys, rotated by ``angles``, and values to ``slots`` of one layer's ``k`` and ``v``.

    Args:
        keys: (n, kv_heads, head_dim), contiguous, as is ``values``: in the KV's dtype (codec ``raw``), int8, or
            float8_e4m3fn. See :mod:`ragkv.store.codecs`.
        slots: int64 (n,), on the device.
        k: (length, kv_heads, head_dim); v has its strides.
        angles: float32 cos and sin of :meth:`ragkv.rope.Rope.angles`, each (n, 1, rotary_dim / 2), contiguous; None:
            a layer without RoPE.
        key_scales: float32 (chunks, kv_heads, head_dim), of coded keys.
        value_scales: float32 (n, kv_heads, 1).
        owner: int64 (n,): which chunk's scales a token's keys take.
    """
    tokens, kv_heads, head_dim = keys.shape
    codec = _codec(keys, k)
    stored = (keys.view(torch.int8), values.view(torch.int8)) if codec == FP8 else (keys, values)
    check_kv(k, v, slots, keys)
    if values.shape != keys.shape or values.dtype != keys.dtype or k.shape[1:] != keys.shape[1:]:
        raise ValueError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} for a KV {tuple(k.shape)}")
    if not values.is_contiguous():
        raise ValueError("stored values are not contiguous")
    scaling = (key_scales, value_scales, owner)
    if codec != RAW and any(part is None or not part.is_contiguous() for part in scaling):
        raise ValueError("coded keys and values need contiguous scales, and an owner for every token")
    cos, sin = angles or (slots, slots)
    half = head_dim // 2 if angles is None else cos.shape[-1]
    if angles is not None and (cos.numel() != tokens * half or not (cos.is_contiguous() and sin.is_contiguous())):
        raise ValueError(f"angles {tuple(cos.shape)} for {tokens} tokens")
    pairs, rest = tokens * kv_heads, head_dim - 2 * half
    _place[(-(-pairs // BLOCK_PAIRS),)](
        *stored,
        *(slots if part is None else part for part in scaling),
        cos,
        sin,
        slots,
        k,
        v,
        pairs,
        kv_heads,
        head_dim,
        half,
        next_power_of_2(half),
        rest,
        next_power_of_2(max(rest, 1)),
        k.stride(0),
        k.stride(1),
        BLOCK_PAIRS,
        codec,
        angles is not None,
        num_warps=4,
    )


def _codec(keys: torch.Tensor, k: torch.Tensor) -> int:
    if keys.dtype == k.dtype:
        return RAW
    if keys.dtype == torch.int8:
        return INT8
    if keys.dtype == torch.float8_e4m3fn:
        return FP8
    raise ValueError(f"stored keys are {keys.dtype}, the KV is {k.dtype}")
