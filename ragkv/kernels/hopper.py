"""Attention as :mod:`ragkv.kernels.attend` has it, for Hopper: softmax beside matrix products (FlashAttention-3, Shah
et al. 2024), in Gluon, Triton's language in which a kernel says itself what is in flight.

One warp copies blocks of keys and values into rings in shared memory; two groups of four warps take 64 packed rows each
and compute on them. A group issues the scores of one block, multiplies the weights of the block before with its values
behind them, and has the softmax of the first overlap the second.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEAD_DIMS, DTYPES = (64, 128), (torch.bfloat16, torch.float16)
ROWS, KEYS = 128, 128  # of a tile, both groups together, and of a block
_STAGES, _GROUPS, _WARPS = 2, 2, 4
_REGISTERS, _COPYING = 240, 24  # of a thread that computes, and of one that copies

# As newer versions call them.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_sync = getattr(gl, "barrier", None) or gl.thread_barrier


class _Shape:
    """What is known at compile time; ``S``, ``O``, ``P`` are layouts of scores, output and weights, ``FLAT`` of rows as
    they lie in memory."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, windowed: bool) -> None:
        out = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, head_dim, 16])
        known = {
            "KV": kv_heads,
            "GROUP": group,
            "HD": head_dim,
            "WINDOWED": windowed,
            "N": KEYS,
            "ROWS": ROWS // _GROUPS,
            "TILE": ROWS,
            "STAGES": _STAGES,
            "WARPS": _WARPS,
            "S": gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, KEYS, 16]),
            "O": out,
            "P": gl.DotOperandLayout(0, out, 2),
            "FLAT": gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [_WARPS, 1], [1, 0]),
        }
        self.__dict__.update({name: gl.constexpr(value) for name, value in known.items()})
        self._name = f"{kv_heads}_{group}_{head_dim}_{windowed:d}"

    def __repr__(self) -> str:
        return self._name


@gluon.constexpr_function
def _shape(kv_heads, group, head_dim, windowed):
    return _Shape(kv_heads, group, head_dim, windowed)


@gluon.jit
def _exp2(x):
    # Without this, denormal results are scaled up and down again: two more instructions for each.
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pin(total):
    # ptxas knows no reason why a wait for products should stand behind arithmetic that does not use them, and moves it
    # to the front. It does not move it over a store: one that never happens, as sums of exponentials are not negative.
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .f32 m; .reg .b32 a; min.f32 m, $2, $3; setp.lt.f32 p, m, 0f00000000;
        mov.b32 a, 0; @p st.volatile.shared.f32 [a], m;
        mov.b32 $0, $2; mov.b32 $1, $3; }""",
        "=f,=f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _weigh(scores, top, total, limit, start, window, scale, C: gl.constexpr, MASKED: gl.constexpr):
    """Weights of one block's scores; ``fade`` is what older results must be multiplied by."""
    if MASKED:
        key = gl.arange(0, C.N, gl.SliceLayout(0, C.S))
        seen = key[None, :] <= (limit - start)[:, None]
        if C.WINDOWED:
            seen = seen & (key[None, :] > (limit - start - window)[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        base = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
    weights = _exp2(scores * scale - base[:, None])
    fade = _exp2(top - base)
    total = total * fade + gl.sum(weights, 1)
    return weights, fade, total, new_top


@gluon.jit
def _zero_behind(ring, slot, held, C: gl.constexpr):
    """Values from row ``held`` on become 0: they may be anything, NaN too, which a weight of 0 would not remove. Both
    groups may do it at once: they write the same bits."""
    CHUNK: gl.constexpr = 32
    for i in gl.static_range(C.N // CHUNK):
        if held < (i + 1) * CHUNK:
            part = ring.index(slot).slice(i * CHUNK, CHUNK, 0)
            key = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, C.FLAT))
            values = part.load(C.FLAT)
            part.store(gl.where(key[:, None] < held, values, gl.zeros_like(values)))
    fence_async_shared()
    _sync()


@gluon.jit
def _span(slots, tile, split, splits, rows, window, C: gl.constexpr):
    """A program's share of a tile's blocks, begin … end; those seen by every row, whole_begin … whole_end; the tile's
    last slot; whether the share is empty: it has a block all the same, which then nobody sees."""
    first = gl.load(slots + gl.minimum((tile * C.TILE) // C.GROUP, rows - 1)).to(gl.int32)
    last = gl.load(slots + gl.minimum((tile * C.TILE + C.TILE - 1) // C.GROUP, rows - 1)).to(gl.int32)
    end = (last + C.N) // C.N
    begin = 0
    whole_begin = 0
    if C.WINDOWED:
        begin = gl.maximum(first - window + 1, 0) // C.N
        whole_begin = (gl.maximum(last - window + 1, 0) + C.N - 1) // C.N
    share = (end - begin + splits - 1) // splits
    empty = begin + split * share >= end
    begin = gl.minimum(begin + split * share, end - 1)
    end = gl.minimum(begin + share, end)
    whole_begin = gl.minimum(gl.maximum(whole_begin, begin), end)
    whole_end = gl.minimum(gl.maximum((first + 1) // C.N, whole_begin), end)
    whole_end = gl.where(empty, whole_begin, whole_end)
    return begin, whole_begin, whole_end, end, last, empty


@gluon.jit
def _copy(desc, ring, full, block, turn, col, C: gl.constexpr):
    slot = turn % C.STAGES
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    _load(desc, [block * C.N, col], full.index(slot), ring.index(slot))


@gluon.jit
def _produce(k, v, slots, rows, splits, window, C: gl.constexpr):
    """The warp that copies: keys one block ahead of values, for in that order their slots become free."""
    kd, kr, kf, ke = k
    vd, vr, vf, ve = v
    tile = gl.num_programs(2) - 1 - gl.program_id(2)
    col = gl.program_id(0) * C.HD
    begin, whole_begin, whole_end, end, last, empty = _span(slots, tile, gl.program_id(1), splits, rows, window, C)
    for turn in range(end - begin + 1):
        if turn < end - begin:
            mbarrier.wait(ke.index(turn % C.STAGES), ((turn // C.STAGES) & 1) ^ 1)
            _copy(kd, kr, kf, begin + turn, turn, col, C)
        if turn > 0:
            old = turn - 1
            mbarrier.wait(ve.index(old % C.STAGES), ((old // C.STAGES) & 1) ^ 1)
            _copy(vd, vr, vf, begin + old, old, col, C)


@gluon.jit
def _scores(qs, k, turn, C: gl.constexpr):
    """Products of queries and keys, in flight."""
    kd, kr, kf, ke = k
    slot = turn % C.STAGES
    mbarrier.wait(kf.index(slot), (turn // C.STAGES) & 1)
    blank = gl.zeros([C.ROWS, C.N], gl.float32, C.S)
    return warpgroup_mma(qs, kr.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def _step(acc, total, top, weights, turn, qs, k, v, begin, limit, window, scale, C: gl.constexpr, MASKED: gl.constexpr):
    """Block ``turn``: the values of the block before are multiplied behind its scores; its softmax overlaps that."""
    kd, kr, kf, ke = k
    vd, vr, vf, ve = v
    old = turn - 1
    old_slot = old % C.STAGES
    scores = _scores(qs, k, turn, C)
    mbarrier.wait(vf.index(old_slot), (old // C.STAGES) & 1)
    acc = warpgroup_mma(weights, vr.index(old_slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(ke.index(turn % C.STAGES), count=1)
    fresh, fade, total, top = _weigh(scores, top, total, limit, (begin + turn) * C.N, window, scale, C, MASKED)
    total = _pin(total)
    acc, fresh = warpgroup_mma_wait(0, deps=(acc, fresh))
    mbarrier.arrive(ve.index(old_slot), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, C.O))[:, None]
    weights = gl.convert_layout(fresh.to(qs.dtype), C.P)
    return acc, total, top, weights


@gluon.jit
def _where_rows(start, head, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Which row and which (row, head) each packed row is: a row's group of heads lies together."""
    m = start + gl.arange(0, C.ROWS, gl.SliceLayout(1, LAYOUT))
    row = m // C.GROUP
    return row, row * (C.KV * C.GROUP) + head * C.GROUP + m % C.GROUP


@gluon.jit
def _leave(out, lse, acc, log_sum, qs, start, head, rows, C: gl.constexpr):
    row, pair = _where_rows(start, head, C.S, C)
    gl.store(lse + pair, log_sum * 0.6931471805599453, mask=row < rows)
    # Through the queries' place, so that whole lines are written.
    _sync()
    qs.store(acc.to(qs.dtype))
    _sync()
    row, pair = _where_rows(start, head, C.FLAT, C)
    d = gl.arange(0, C.HD, gl.SliceLayout(0, C.FLAT))
    gl.store(out + pair[:, None] * C.HD + d[None, :], qs.load(C.FLAT), mask=(row < rows)[:, None])


@gluon.jit
def _leave_part(part, part_lse, acc, log_sum, split, start, head, rows, C: gl.constexpr):
    pairs = rows * (C.KV * C.GROUP)
    row, pair = _where_rows(start, head, C.S, C)
    gl.store(part_lse + split * pairs + pair, log_sum, mask=row < rows)
    row, pair = _where_rows(start, head, C.O, C)
    d = gl.arange(0, C.HD, gl.SliceLayout(0, C.O))
    at = split * (pairs * C.HD) + pair[:, None] * C.HD + d[None, :]
    gl.store(part + at, acc, mask=(row < rows)[:, None])


@gluon.jit
def _consume(
    q, slots, out, lse, part, part_lse, k, v, qr, rows, splits, window, scale, RANK: gl.constexpr, C: gl.constexpr
):
    """Four warps: a tile's rows from ``RANK · ROWS`` on, over a program's share of the keys."""
    kd, kr, kf, ke = k
    vd, vr, vf, ve = v
    head = gl.program_id(0)
    split = gl.program_id(1)
    tile = gl.num_programs(2) - 1 - gl.program_id(2)  # the tiles that see most begin first
    start = tile * C.TILE + RANK * C.ROWS
    row, pair = _where_rows(start, head, C.FLAT, C)
    d = gl.arange(0, C.HD, gl.SliceLayout(0, C.FLAT))
    queries = gl.load(q + pair[:, None] * C.HD + d[None, :], mask=(row < rows)[:, None], other=0.0)
    row, pair = _where_rows(start, head, C.S, C)
    limit = gl.load(slots + row, mask=row < rows, other=-1).to(gl.int32)
    begin, whole_begin, whole_end, end, last, empty = _span(slots, tile, split, splits, rows, window, C)
    limit = gl.where(empty, -1, limit)
    qs = qr.index(RANK)
    qs.store(queries)
    fence_async_shared()
    _sync()

    acc = gl.zeros([C.ROWS, C.HD], gl.float32, C.O)
    top = gl.full([C.ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, C.S))
    total = gl.zeros([C.ROWS], gl.float32, gl.SliceLayout(1, C.S))
    # The first block, masked whether it need be or not.
    scores = _scores(qs, k, 0, C)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(ke.index(0), count=1)
    fresh, fade, total, top = _weigh(scores, top, total, limit, begin * C.N, window, scale, C, True)
    weights = gl.convert_layout(fresh.to(qs.dtype), C.P)
    stop = end - begin
    whole = gl.maximum(whole_begin - begin, 1)
    edge = gl.maximum(whole_end - begin, whole)
    if C.WINDOWED:
        for turn in range(1, whole):
            acc, total, top, weights = _step(
                acc, total, top, weights, turn, qs, k, v, begin, limit, window, scale, C, True
            )
    for turn in range(whole, edge):
        acc, total, top, weights = _step(
            acc, total, top, weights, turn, qs, k, v, begin, limit, window, scale, C, False
        )
    for turn in range(edge, stop):
        acc, total, top, weights = _step(acc, total, top, weights, turn, qs, k, v, begin, limit, window, scale, C, True)
    slot = (stop - 1) % C.STAGES
    mbarrier.wait(vf.index(slot), ((stop - 1) // C.STAGES) & 1)
    held = last + 1 - (end - 1) * C.N
    if held < C.N:
        _zero_behind(vr, slot, held, C)
    acc = warpgroup_mma(weights, vr.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    weight = gl.where(total > 0.0, total, 1.0)
    acc = acc * gl.convert_layout(1.0 / weight, gl.SliceLayout(1, C.O))[:, None]
    log_sum = top + gl.log2(weight)
    if splits == 1:
        _leave(out, lse, acc, log_sum, qs, start, head, rows, C)
    else:
        _leave_part(part, part_lse, acc, log_sum, split, start, head, rows, C)


@gluon.jit(do_not_specialize=["rows", "splits", "window", "scale"])
def _attend(
    q, kd, vd, slots, out, lse, part, part_lse, rows, splits, window, scale,
    KV: gl.constexpr, GROUP: gl.constexpr, HD: gl.constexpr, WINDOWED: gl.constexpr,
    REGISTERS: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = _shape(KV, GROUP, HD, WINDOWED)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    qr = gl.allocate_shared_memory(kd.dtype, [2, C.ROWS, HD], kd.layout)
    kr = gl.allocate_shared_memory(kd.dtype, [C.STAGES, C.N, HD], kd.layout)
    vr = gl.allocate_shared_memory(kd.dtype, [C.STAGES, C.N, HD], vd.layout)
    kf = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], BAR)
    vf = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], BAR)
    ke = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], BAR)
    ve = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], BAR)
    for i in gl.static_range(C.STAGES):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ke.index(i), count=2)
        mbarrier.init(ve.index(i), count=2)
    fence_async_shared()
    _sync()

    k = (kd, kr, kf, ke)
    v = (vd, vr, vf, ve)
    gl.warp_specialize(
        [
            (_consume, (q, slots, out, lse, part, part_lse, k, v, qr, rows, splits, window, scale, 0, C)),
            (_consume, (q, slots, out, lse, part, part_lse, k, v, qr, rows, splits, window, scale, 1, C)),
            (_produce, (k, v, slots, rows, splits, window, C)),
        ],
        [4, 1],
        [REGISTERS, COPYING],
    )


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    room: Any,
    scale: float,
    window: int | None,
) -> None:
    """Write ``room.out`` and ``room.lse``, or their parts where it splits keys.

    All is as :func:`ragkv.kernels.attend.attend` has it, but for layers; heads lie side by side in ``k`` and ``v``, and
    ``scale`` makes logarithms to base 2.
    """
    rows, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    width = kv_heads * head_dim
    kd, vd = (TensorDescriptor(part, [length, width], [part.stride(0), 1], [KEYS, head_dim], layout) for part in (k, v))
    _attend[(kv_heads, room.splits, room.tiles)](
        q, kd, vd, slots, room.out, room.lse, room.part, room.part_lse, rows, room.splits, window or 0, scale,
        kv_heads, heads // kv_heads, head_dim, window is not None, _REGISTERS, _COPYING, num_warps=_WARPS,
    )  # fmt: skip
