"""How much attention some rows pay to every key: what attention kernels do not give away."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ragkv.kernels.attend import LOG2E
from ragkv.kernels.shapes import check_kv, next_power_of_2

BLOCK_ROWS, BLOCK_KEYS = 64, 32


@triton.jit(do_not_specialize=["first", "rows", "length", "layers", "window", "scale"])
def _score_keys(
    q,
    lse,
    k,
    slots,
    scores,
    first,
    rows,
    length,
    layers,
    window,
    scale,
    layer_stride,
    LOG2E: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HD: tl.constexpr,
    HD_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # One program has a block of keys for all layers and heads: so sums are always taken in the same order.
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, HD_PAD)
    key_held = (key < length)[:, None] & (d < HD)[None, :]
    at = key[:, None] * STRIDE + d[None, :]
    tiles = ((rows - first) * GROUP + BLOCK_M - 1) // BLOCK_M
    paid = tl.zeros([BLOCK_N], tl.float32)
    for each in range(layers * KV_HEADS):
        layer = each // KV_HEADS
        head = each % KV_HEADS
        here = k + tl.cast(layer, tl.int64) * layer_stride + head * HEAD_STRIDE
        keys = tl.trans(tl.load(here + at, mask=key_held, other=0.0))
        for tile in range(tiles):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row = first + m // GROUP
            alive = row < rows
            pair = (layer * rows + row) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
            held = alive[:, None] & (d < HD)[None, :]
            queries = tl.load(q + pair[:, None] * HD + d[None, :], mask=held, other=0.0)
            log_sum = tl.load(lse + pair, mask=alive, other=0.0) * LOG2E
            limit = tl.load(slots + row, mask=alive, other=-1).to(tl.int32)
            logits = tl.dot(queries, keys, input_precision="ieee") * scale
            seen = key[None, :] <= limit[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] > limit[:, None] - window)
            weights = tl.exp2(tl.where(seen, logits - log_sum[:, None], float("-inf")))
            paid += tl.sum(weights, 0)
    old = tl.load(scores + key, mask=key < length, other=0.0)
    tl.store(scores + key, old + paid, mask=key < length)


def score_keys(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor,
    scores: torch.Tensor,
    *,
    last: int,
    scale: float,
    window: int | None = None,
    layer_stride: int = 0,
) -> None:
    """Add to ``scores``, for every key, the sum of the attention weights that the ``last`` rows' heads give it.

    Args:
        q: (rows, heads, head_dim), or with layers in front, and ``slots`` int64 (rows,), as
            :func:`ragkv.kernels.attend.attend` took them.
        lse: float32, as it returned it.
        k: (length, kv_heads, head_dim) of the first layer.
        scores: float32 (length,).
        layer_stride: elements from one layer's keys to the next one's.
    """
    *layers, rows, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    check_kv(k, k, slots, q[0] if layers else q)
    if scores.shape != (length,) or scores.dtype != torch.float32 or lse.shape != q.shape[:-1]:
        raise ValueError(f"scores {tuple(scores.shape)} of {scores.dtype}, log-sum-exp {tuple(lse.shape)}")
    windowed = window is not None and window < length
    _score_keys[(-(-length // BLOCK_KEYS),)](
        q,
        lse,
        k,
        slots,
        scores,
        max(0, rows - last),
        rows,
        length,
        math.prod(layers),
        window if windowed else 0,
        scale * LOG2E,
        layer_stride,
        LOG2E,
        kv_heads,
        heads // kv_heads,
        head_dim,
        max(16, next_power_of_2(head_dim)),
        k.stride(0),
        k.stride(1),
        BLOCK_ROWS,
        BLOCK_KEYS,
        windowed,
        num_warps=4,
        num_stages=2,
    )
