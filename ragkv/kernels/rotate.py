"""From the fused projection to rotated queries and a KV that holds the rows' keys and values, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import check_kv, next_power_of_2

BLOCK_HEADS = 16


@triton.jit(do_not_specialize=["eps"])
def _rope_write(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    slots,
    out,
    k,
    v,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
):
    # Every product and sum is rounded to the model's dtype, as the library's own operations are.
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF_PAD)
    j = tl.arange(0, REST_PAD)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    alive = head < HEADS + 2 * KV_HEADS
    dtype = qkv.dtype.element_ty
    source = qkv + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HD) + head[:, None] * HD
    held = alive[:, None] & (i < HALF)[None, :]
    rest_held = alive[:, None] & (j < REST)[None, :]
    x = tl.load(source + i[None, :], mask=held, other=0.0).to(tl.float32)
    y = tl.load(source + HALF + i[None, :], mask=held, other=0.0).to(tl.float32)
    z = tl.zeros([BLOCK, REST_PAD], tl.float32)
    if REST > 0:
        z = tl.load(source + 2 * HALF + j[None, :], mask=rest_held, other=0.0).to(tl.float32)

    if NORMED:
        squares = tl.sum(x * x, 1) + tl.sum(y * y, 1)
        if REST > 0:
            squares += tl.sum(z * z, 1)
        scale = tl.rsqrt(squares / HD + eps)[:, None]
        chooses_q = is_q[:, None]
        plain = is_v[:, None]
        w = tl.where(
            chooses_q,
            tl.load(q_weight + i, mask=i < HALF, other=0.0)[None, :],
            tl.load(k_weight + i, mask=i < HALF, other=0.0)[None, :],
        )
        x = tl.where(plain, x, ((x * scale).to(dtype).to(tl.float32) * w.to(tl.float32)).to(dtype).to(tl.float32))
        w = tl.where(
            chooses_q,
            tl.load(q_weight + HALF + i, mask=i < HALF, other=0.0)[None, :],
            tl.load(k_weight + HALF + i, mask=i < HALF, other=0.0)[None, :],
        )
        y = tl.where(plain, y, ((y * scale).to(dtype).to(tl.float32) * w.to(tl.float32)).to(dtype).to(tl.float32))
        if REST > 0:
            w = tl.where(
                chooses_q,
                tl.load(q_weight + 2 * HALF + j, mask=j < REST, other=0.0)[None, :],
                tl.load(k_weight + 2 * HALF + j, mask=j < REST, other=0.0)[None, :],
            )
            z = tl.where(plain, z, ((z * scale).to(dtype).to(tl.float32) * w.to(tl.float32)).to(dtype).to(tl.float32))

    if ROTATED:
        c = tl.load(cos + row * (2 * HALF) + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + row * (2 * HALF) + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        turned_x = (x * c).to(dtype).to(tl.float32) - (y * s).to(dtype).to(tl.float32)
        turned_y = (y * c).to(dtype).to(tl.float32) + (x * s).to(dtype).to(tl.float32)
        x = tl.where(is_v[:, None], x, turned_x)
        y = tl.where(is_v[:, None], y, turned_y)

    slot = tl.load(slots + row)
    to_q = out + row.to(tl.int64) * (HEADS * HD) + head[:, None] * HD
    to_k = k + slot * STRIDE + (head[:, None] - HEADS) * HEAD_STRIDE
    to_v = v + slot * STRIDE + (head[:, None] - HEADS - KV_HEADS) * HEAD_STRIDE
    half = (i < HALF)[None, :]
    tl.store(to_q + i[None, :], x.to(dtype), mask=is_q[:, None] & half)
    tl.store(to_k + i[None, :], x.to(dtype), mask=is_k[:, None] & half)
    tl.store(to_v + i[None, :], x.to(dtype), mask=is_v[:, None] & half)
    tl.store(to_q + HALF + i[None, :], y.to(dtype), mask=is_q[:, None] & half)
    tl.store(to_k + HALF + i[None, :], y.to(dtype), mask=is_k[:, None] & half)
    tl.store(to_v + HALF + i[None, :], y.to(dtype), mask=is_v[:, None] & half)
    if REST > 0:
        rest = (j < REST)[None, :]
        tl.store(to_q + 2 * HALF + j[None, :], z.to(dtype), mask=is_q[:, None] & rest)
        tl.store(to_k + 2 * HALF + j[None, :], z.to(dtype), mask=is_k[:, None] & rest)
        tl.store(to_v + 2 * HALF + j[None, :], z.to(dtype), mask=is_v[:, None] & rest)


def rope_write(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    out: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 0.0,
) -> None:
    """Norm and rotate queries and keys; write queries to ``out``, keys and values to ``slots`` of ``k`` and ``v``.

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim), contiguous.
        rotary: the library's cos and sin, each (rows, rotary_dim), their halves equal; None: a layer without RoPE.
        norms: weights (head_dim,) of the RMS norms of queries and keys, with ``eps``; None: no norm.
        slots: int64 (rows,).
        out: (rows, heads, head_dim), contiguous.
        k: (length, kv_heads, head_dim), one layer of a KV; v has its strides.
    """
    rows, heads, head_dim = out.shape
    kv_heads = k.shape[1]
    check_kv(k, v, slots, qkv)
    if qkv.shape != (rows, (heads + 2 * kv_heads) * head_dim) or out.dtype != qkv.dtype or k.dtype != qkv.dtype:
        raise ValueError(f"a projection {tuple(qkv.shape)} for queries {tuple(out.shape)}")
    turning = head_dim // 2 * 2 if rotary is None else rotary[0].shape[-1]
    if rotary is not None and (rotary[0].shape != (rows, turning) or not rotary[0].is_contiguous()):
        raise ValueError(f"a rotation {tuple(rotary[0].shape)} for {rows} rows")
    cos, sin = rotary or (qkv, qkv)
    q_weight, k_weight = norms or (qkv, qkv)
    half, rest = turning // 2, head_dim - turning
    _rope_write[(rows, -(-(heads + 2 * kv_heads) // BLOCK_HEADS))](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        slots,
        out,
        k,
        v,
        eps,
        heads,
        kv_heads,
        head_dim,
        half,
        next_power_of_2(half),
        rest,
        next_power_of_2(max(rest, 1)),
        k.stride(0),
        k.stride(1),
        BLOCK_HEADS,
        norms is not None,
        rotary is not None,
        num_warps=4,
    )
