"""Attention of ascending query rows over a strided KV, each row up to its own slot (FlashAttention-2, Dao 2023).

The query heads that share a KV head are packed, with their rows, into the rows of one tile: a key is read once for all
of them, and a tile spans few rows, so that the keys of its last row are hardly more than those of its first. A tile
reads its first and last slot itself; only blocks of keys that some row may not see are masked. Where tiles are too few
for the chip, each shares its keys among several programs, whose results a second kernel joins.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import check_kv, next_power_of_2

log = logging.getLogger("ragkv")
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
MAX_SPLITS = 32
_JOINED = 8  # rows' heads of a program that joins
_CPU_PROGRAMS = 8  # Triton's interpreter: few, but more than one
_SOME = 256  # packed rows that leave much of a large tile empty
_HOPPER = (9, 0)
_dropped: list[bool] = []


class Tile(NamedTuple):
    """How much one program takes on: ``rows`` of packed queries, ``keys`` at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _step(
    acc,
    total,
    top,
    queries,
    k,
    v,
    block,
    limit,
    last,
    window,
    scale,
    HD: tl.constexpr,
    HD_PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One block of keys. ``k`` and ``v`` point at the head's first key; ``scale`` makes logarithms to base 2."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HD_PAD)
    at = n[:, None] * STRIDE + d[None, :] + block * (BLOCK_N * STRIDE)
    key = block * BLOCK_N + n
    if MASKED:
        # What lies behind the tile's last slot may be anything, NaN too, which a weight of 0 would not remove.
        held = (key <= last)[:, None] & (d < HD)[None, :]
        keys = tl.load(k + at, mask=held, other=0.0)
    elif HD == HD_PAD:
        keys = tl.load(k + at)
    else:
        keys = tl.load(k + at, mask=(d < HD)[None, :], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        seen = key[None, :] <= limit[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > limit[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
    weights = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    if MASKED:
        values = tl.load(v + at, mask=held, other=0.0)
    elif HD == HD_PAD:
        values = tl.load(v + at)
    else:
        values = tl.load(v + at, mask=(d < HD)[None, :], other=0.0)
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit(do_not_specialize=["rows", "pairs", "splits", "window", "scale"])
def _attend(
    q,
    k,
    v,
    slots,
    out,
    lse,
    part,
    part_lse,
    rows,
    pairs,
    splits,
    window,
    scale,
    layer_stride,
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
    layer = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # the tiles that see most begin first
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HD_PAD)
    row = m // GROUP
    alive = row < rows
    pair = (layer * rows + row) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
    at = pair[:, None] * HD + d[None, :]
    held = alive[:, None] & (d < HD)[None, :]
    queries = tl.load(q + at, mask=held, other=0.0)
    limit = tl.load(slots + row, mask=alive, other=-1).to(tl.int32)
    first = tl.load(slots + (tile * BLOCK_M) // GROUP).to(tl.int32)
    last = tl.load(slots + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)).to(tl.int32)

    # Blocks of keys: begin … end are looked at, whole_begin … whole_end seen by every row of the tile.
    end = (last + BLOCK_N) // BLOCK_N
    begin = 0
    whole_begin = 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N
        whole_begin = (tl.maximum(last - window + 1, 0) + BLOCK_N - 1) // BLOCK_N
    whole_end = (first + 1) // BLOCK_N
    # This program's share of them.
    share = (end - begin + splits - 1) // splits
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), end)
    left = whole_begin - begin
    edges = left + end - whole_end

    k += tl.cast(layer, tl.int64) * layer_stride + head * HEAD_STRIDE
    v += tl.cast(layer, tl.int64) * layer_stride + head * HEAD_STRIDE
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HD_PAD], tl.float32)
    for block in range(whole_begin, whole_end):
        acc, total, top = _step(
            acc, total, top, queries, k, v, block, limit, last, window, scale,
            HD, HD_PAD, STRIDE, BLOCK_N, False, WINDOWED,
        )  # fmt: skip
    for edge in range(edges):
        block = begin + edge + tl.where(edge < left, 0, whole_end - whole_begin)
        acc, total, top = _step(
            acc, total, top, queries, k, v, block, limit, last, window, scale,
            HD, HD_PAD, STRIDE, BLOCK_N, True, WINDOWED,
        )  # fmt: skip

    weight = tl.where(total > 0.0, total, 1.0)
    acc = acc / weight[:, None]
    log_sum = top + tl.log2(weight)
    if splits == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=held)
        tl.store(lse + pair, log_sum * LN2, mask=alive)
    else:
        tl.store(part + split * (pairs * HD) + at, acc, mask=held)
        tl.store(part_lse + split * pairs + pair, log_sum, mask=alive)


@triton.jit(do_not_specialize=["pairs", "splits"])
def _join(
    part,
    part_lse,
    out,
    lse,
    pairs,
    splits,
    HD: tl.constexpr,
    HD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, HD_PAD)
    alive = pair < pairs
    held = (split < splits)[:, None] & alive[None, :]
    logs = tl.load(part_lse + (split * pairs)[:, None] + pair[None, :], mask=held, other=float("-inf"))
    top = tl.where(alive, tl.max(logs, 0), 0.0)
    total = tl.where(alive, tl.sum(tl.exp2(logs - top[None, :]), 0), 1.0)
    joined = tl.zeros([PAIRS, HD_PAD], tl.float32)
    # Unrolled: the loads of all splits are in flight at once.
    for each in tl.static_range(SPLITS):
        there = alive & (each < splits)
        log = tl.load(part_lse + each * pairs + pair, mask=there, other=float("-inf"))
        at = (each * pairs + pair)[:, None] * HD + d[None, :]
        rows = tl.load(part + at, mask=there[:, None] & (d < HD)[None, :], other=0.0)
        joined += tl.exp2(log - top)[:, None] * rows
    to = pair[:, None] * HD + d[None, :]
    tl.store(out + to, (joined / total[:, None]).to(out.dtype.element_ty), mask=alive[:, None] & (d < HD)[None, :])
    tl.store(lse + pair, (top + tl.log2(total)) * LN2, mask=alive)


class AttendRoom:
    """What :func:`attend` writes: made once, used again by every layer.

    Args:
        q: queries of the shape, (rows, heads, head_dim) or (layers, rows, heads, head_dim), dtype and device that it
            will be given.
        length: about how many keys there are.
        tile: of the kernel for any device; by default :func:`choose_tile`'s, or the one for Hopper runs where it can.
        splits: by default :func:`choose_splits`'s.

    Attributes:
        hopper: that kernel, if it runs.
        out: as the queries.
        lse: float32 (rows, heads), natural log-sum-exp of every row's scaled scores; with layers in front as there.
    """

    def __init__(
        self,
        q: torch.Tensor,
        kv_heads: int,
        length: int,
        *,
        tile: Tile | None = None,
        splits: int | None = None,
    ) -> None:
        *layers, rows, heads, head_dim = q.shape
        packed, groups = rows * (heads // kv_heads), kv_heads * math.prod(layers)
        self.hopper = None if tile or layers else hopper_for(packed, head_dim, q)
        if self.hopper is not None:
            tile = Tile(self.hopper.ROWS, self.hopper.KEYS, 8, 2)
        self.tile = tile or choose_tile(packed, head_dim, q.dtype)
        self.tiles = -(-packed // self.tile.rows)
        self.splits = min(MAX_SPLITS, splits or choose_splits(self.tiles * groups, length, self.tile, q.device))
        self.out = torch.empty_like(q)
        self.lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        self.part = self.part_lse = self.lse  # not touched unless keys are split
        if self.splits > 1:
            size = (self.splits, *q.shape)
            self.part = torch.empty(size, dtype=torch.float32, device=q.device)
            self.part_lse = torch.empty(size[:-1], dtype=torch.float32, device=q.device)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    room: AttendRoom | None = None,
    layer_stride: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's attention over keys ``0 … its slot``, or the last ``window`` of them.

    Args:
        q: (rows, heads, head_dim), contiguous; or (layers, rows, heads, head_dim), the same rows at several layers.
        k: (length, kv_heads, head_dim), head_dim contiguous, of the first layer; v has its strides.
        slots: int64 (rows,), ascending, below ``length``, on the same device.
        room: made for these shapes; its ``out`` and ``lse`` are what is returned.
        layer_stride: elements from one layer's keys to the next one's.

    Returns:
        ``out``, of the shape of ``q``, and ``lse`` float32, without head_dim.
    """
    *layers, rows, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    pairs = rows * heads * math.prod(layers)
    check_kv(k, v, slots, q[0] if layers else q)
    if q.dtype != k.dtype:
        raise ValueError(f"queries are {q.dtype}, keys {k.dtype}")
    room = room or AttendRoom(q, kv_heads, length)
    pad, seen = max(16, next_power_of_2(head_dim)), window if window is not None and window < length else None
    if room.hopper is not None and k.stride(1) == head_dim:
        room.hopper.launch(q, k, v, slots, room, scale * LOG2E, seen)
    else:
        _launch(q, k, v, slots, room, scale * LOG2E, seen, layer_stride)
    if room.splits > 1:
        _join[(-(-pairs // _JOINED),)](
            room.part, room.part_lse, room.out, room.lse, pairs, room.splits, head_dim, pad,
            next_power_of_2(room.splits), _JOINED, num_warps=4,
        )  # fmt: skip
    return room.out, room.lse


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    room: AttendRoom,
    scale: float,
    window: int | None,
    layer_stride: int,
) -> None:
    *layers, rows, heads, head_dim = q.shape
    kv_heads, tile = k.shape[1], room.tile
    _attend[(kv_heads * math.prod(layers), room.splits, room.tiles)](
        q,
        k,
        v,
        slots,
        room.out,
        room.lse,
        room.part,
        room.part_lse,
        rows,
        rows * heads * math.prod(layers),
        room.splits,
        window or 0,
        scale,
        layer_stride,
        kv_heads,
        heads // kv_heads,
        head_dim,
        max(16, next_power_of_2(head_dim)),
        k.stride(0),
        k.stride(1),
        tile.rows,
        tile.keys,
        window is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def hopper_for(packed: int, head_dim: int, like: torch.Tensor) -> ModuleType | None:
    """:mod:`ragkv.kernels.hopper`, where it takes rows like ``like``, and ``packed`` are enough for it."""
    if packed <= _SOME or _dropped or (hopper := _hopper(like.device)) is None:
        return None
    return hopper if head_dim in hopper.HEAD_DIMS and like.dtype in hopper.DTYPES else None


def drop_hopper(packed: int, head_dim: int, like: torch.Tensor) -> bool:
    """Do without the kernel for Hopper from now on, in rooms made after this; False where it does not run anyway."""
    if hopper_for(packed, head_dim, like) is None:
        return False
    _dropped.append(True)
    return True


@cache
def _hopper(device: torch.device) -> ModuleType | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _HOPPER:
        return None
    try:
        from ragkv.kernels import hopper
    except Exception as error:  # Gluon is young: a Triton may lack it, or have another
        log.info("attention does without its kernel for Hopper: %r", error)
        return None
    return hopper


def choose_tile(packed: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """For ``packed`` rows (rows times query heads per KV head): what torch's own flex attention takes on Hopper,
    and smaller tiles where they would be empty."""
    if dtype == torch.float32 or head_dim > 128:
        return Tile(16 if packed <= 16 else 32, 32, 4, 2)
    if packed <= 16:
        return Tile(16, 64, 4, 3)
    if packed <= _SOME:
        return Tile(64, 64, 4, 3)
    return Tile(128, 128, 4, 3) if head_dim <= 64 else Tile(128, 64, 8, 3)


def choose_splits(programs: int, length: int, tile: Tile, device: torch.device) -> int:
    """At most twice as many programs as multiprocessors, where each has a few blocks of keys to read: that balances
    tiles that see few keys with those that see all of them."""
    wanted = 2 * _multiprocessors(device) // programs
    return max(1, min(wanted, length // (4 * tile.keys)))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
