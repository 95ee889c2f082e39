"""Attention of one row of each of many requests over blocks of a pool (PagedAttention, Kwon et al. 2023).

Lengths are read on the device, so that one launch, captured in a CUDA graph, serves rows of any length. The query heads
that share a KV head are the rows of one tile. Each row's keys are shared among several programs, as many as there are
keys for (flash-decoding); the last of them to end joins what all of them found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragkv.kernels.attend import LOG2E
from ragkv.kernels.shapes import DTYPES, next_power_of_2

KEYS = 64  # looked at at a time
MIN_SPLITS, MAX_SPLITS = 8, 32
_BUSY = 512  # programs
MIN_SHARE, MAX_SHARE = 2, 16  # tiles of keys that a program reads at least: more where programs are many


@triton.jit(do_not_specialize=["width", "window", "scale"])
def _attend_paged(
    q,
    k,
    v,
    tables,
    lanes,
    positions,
    out,
    part,
    part_lse,
    arrived,
    width,
    window,
    scale,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HD: tl.constexpr,
    HD_PAD: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)  # the slowest: those that find nothing to do come last
    kv_heads = tl.num_programs(0)
    lane = tl.load(lanes + row).to(tl.int64)
    position = tl.load(positions + lane)
    # Tiles of keys begin … end; this program's share of them.
    first_seen = 0
    if WINDOWED:
        first_seen = tl.maximum(position - window + 1, 0)
    begin = first_seen // KEYS
    end = position // KEYS + 1
    used = tl.minimum(tl.maximum((end - begin) // SHARE, 1), SPLITS)
    share = (end - begin + used - 1) // used
    used = (end - begin + share - 1) // share
    if split >= used:
        return
    begin += split * share
    end = tl.minimum(begin + share, end)

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, HD_PAD)
    n = tl.arange(0, KEYS)
    pair = (row * kv_heads + head) * GROUP + g
    held = (g < GROUP)[:, None] & (d < HD)[None, :]
    queries = tl.load(q + pair[:, None] * HD + d[None, :], mask=held, other=0.0)
    table = tables + lane * width
    k += head * HEAD_STRIDE
    v += head * HEAD_STRIDE
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HD_PAD], tl.float32)
    for tile in range(begin, end):
        key = tile * KEYS + n
        seen = (key <= position) & (key >= first_seen)
        block = tl.load(table + key // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        at = (block * BLOCK_STRIDE + (key % BLOCK_TOKENS) * STRIDE)[:, None] + d[None, :]
        # What lies behind the row's position may be anything, NaN too, which a weight of 0 would not remove.
        inside = seen[:, None] & (d < HD)[None, :]
        keys = tl.load(k + at, mask=inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(v + at, mask=inside, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top

    place = out + pair[:, None] * HD + d[None, :]
    if used == 1:
        tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=held)
        return
    # (rows, kv_heads, SPLITS, GROUP) of parts
    here = ((row * kv_heads + head) * SPLITS + split) * GROUP + g
    tl.store(part + here[:, None] * HD + d[None, :], acc / total[:, None], mask=held)
    tl.store(part_lse + here, top + tl.log2(total), mask=g < GROUP)
    tl.debug_barrier()  # all of this program's parts, before it says so
    count = tl.atomic_add(arrived + row * kv_heads + head, 1, sem="acq_rel")
    if count != used - 1:
        return
    tl.store(arrived + row * kv_heads + head, 0)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HD_PAD], tl.float32)
    for other in range(used):
        there = ((row * kv_heads + head) * SPLITS + other) * GROUP + g
        log_sum = tl.load(part_lse + there, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        found = tl.load(part + there[:, None] * HD + d[None, :], mask=held, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, log_sum)
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(log_sum - new_top)
        acc = acc * fade[:, None] + found * weight[:, None]
        total = total * fade + weight
        top = new_top
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=held)


class PagedRoom:
    """What :func:`attend_paged` writes for rows like ``q`` (rows, heads, head_dim), used again by every layer.

    Attributes:
        out: (rows, heads, head_dim).
        share: of a row's keys, the fewest tiles for a program; by default by how many rows there are.
        splits: most programs that share a row's keys.
    """

    def __init__(self, q: torch.Tensor, kv_heads: int, *, splits: int | None = None, share: int | None = None) -> None:
        rows, heads, head_dim = q.shape
        programs = rows * kv_heads
        self.share = share or min(max(programs // 32, MIN_SHARE), MAX_SHARE)
        # Enough rows keep the device busy, and what joins nothing is the faster kernel.
        wanted = 1 if programs >= _BUSY else min(max(next_power_of_2(_BUSY // programs), MIN_SPLITS), MAX_SPLITS)
        self.splits = splits or wanted
        self.out = torch.empty_like(q)
        self.part = q.new_empty((rows, kv_heads, self.splits, heads // kv_heads, head_dim), dtype=torch.float32)
        self.part_lse = q.new_empty(self.part.shape[:-1], dtype=torch.float32)
        self.arrived = q.new_zeros((rows, kv_heads), dtype=torch.int32)


def attend_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    lanes: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    room: PagedRoom | None = None,
) -> torch.Tensor:
    """Every row's attention over positions ``0 … its own``, or the last ``window`` of them.

    Args:
        q: (rows, heads, head_dim), contiguous.
        k: (blocks, block tokens, kv_heads, head_dim), one layer of a pool, head_dim contiguous; v has its strides.
        tables: int32 (all lanes, width), each lane's blocks.
        lanes: int32 (rows,), whose lane each row is.
        positions: int32 (all lanes,).
        room: made for these shapes; its ``out`` is what is returned.
    """
    rows, heads, head_dim = q.shape
    _, block_tokens, kv_heads, _ = k.shape
    _check(q, k, v, tables, lanes, positions)
    room = room or PagedRoom(q, kv_heads)
    group = heads // kv_heads
    _attend_paged[(kv_heads, rows, room.splits)](
        q,
        k,
        v,
        tables,
        lanes,
        positions,
        room.out,
        room.part,
        room.part_lse,
        room.arrived,
        tables.stride(0),
        window or 0,
        scale * LOG2E,
        group,
        max(16, next_power_of_2(group)),
        head_dim,
        max(16, next_power_of_2(head_dim)),
        k.stride(0),
        k.stride(2),
        k.stride(1),
        block_tokens,
        KEYS if head_dim <= 128 else KEYS // 2,
        room.share,
        room.splits,
        window is not None,
        num_warps=4,
        num_stages=3 if q.dtype != torch.float32 else 1,
    )
    return room.out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: torch.Tensor, *of_lanes: torch.Tensor) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype or not q.is_contiguous():
        raise ValueError(f"queries are {q.dtype} of strides {q.stride()}, keys {k.dtype}, values {v.dtype}")
    if k.shape != v.shape or k.stride() != v.stride() or k.stride(3) != 1:
        raise ValueError(f"keys {tuple(k.shape)} of strides {k.stride()}, values {tuple(v.shape)} of {v.stride()}")
    if any(each.dtype != torch.int32 for each in (tables, *of_lanes)) or tables.stride(1) != 1:
        raise ValueError(f"tables are {tables.dtype} of strides {tables.stride()}, lanes {of_lanes[0].dtype}")
