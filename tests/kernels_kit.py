"""What every kernel must do, as checks that run on any device: in Triton's interpreter on a CPU, compiled on CUDA."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from ragkv.kernels import twins
from ragkv.kernels.slabs import SlabPlacer, span_table
from ragkv.kv import KvShape
from ragkv.rope import Rope
from ragkv.unpacking import Unpacker
from tests.codec_kit import encoded, random_kv

CPU_DTYPES = [torch.float32, torch.float16]  # the interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = [Shape(4, 2, 64), Shape(6, 2, 96), Shape(7, 1, 128), Shape(3, 3, 24)]


class Case(NamedTuple):
    """Which rows look at how many keys."""

    rows: list[int]
    length: int
    window: int | None = None


CASES = {
    "one": Case([299], 300),
    "one-in-front": Case([0], 300),
    "tail": Case(list(range(180, 201)), 201),
    "scattered": Case([*list(range(0, 300, 7)), 299], 300),
    "scattered-windowed": Case([*list(range(0, 300, 7)), 299], 300, 40),
    "wide-window": Case([3, 90, 299], 300, 1000),
    "narrow-window": Case([0, 1, 150, 299], 300, 1),
    "all": Case(list(range(150)), 150),
    "not-to-the-end": Case([1, 70, 71], 300),
}


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


def attend_inputs(case: Case, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Keys and values are strided views; what lies behind the last row's slot is NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((len(case.rows), shape.heads, shape.head_dim), generator=generator)
    kv = torch.randn((case.length + 5, 2, shape.kv_heads, shape.head_dim), generator=generator)
    kv[max(case.rows) + 1 :] = float("nan")
    kv = kv.to(dtype).to(device)
    return Inputs(
        (2 * q).to(dtype).to(device),
        kv[: case.length, 0],
        kv[: case.length, 1],
        torch.tensor(case.rows, device=device),
    )


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(actual).all()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def check_attend(
    kernels: ModuleType, case: Case, shape: Shape, dtype: torch.dtype, device: str, splits: int | None = None
) -> None:
    given = attend_inputs(case, shape, dtype, device)
    scale = shape.head_dim**-0.5
    room = kernels.AttendRoom(given.q, shape.kv_heads, case.length, splits=splits)
    for filled in (room.out, room.lse, room.part, room.part_lse):
        filled.fill_(float("nan"))
    out, lse = kernels.attend(*given, scale=scale, window=case.window, room=room)
    expected, expected_lse = twins.attend(*given, scale=scale, window=case.window)
    close(out, expected, dtype)
    close(lse, expected_lse, torch.float16 if dtype == torch.float32 else dtype)


def check_scores(
    kernels: ModuleType, case: Case, shape: Shape, dtype: torch.dtype, device: str, last: int
) -> None:  # fmt: skip
    given = attend_inputs(case, shape, dtype, device)
    given.k.nan_to_num_()
    scale = shape.head_dim**-0.5
    _, lse = twins.attend(*given, scale=scale, window=case.window)
    start = torch.rand(case.length, generator=torch.Generator().manual_seed(1)).to(device)
    actual, expected = start.clone(), start.clone()
    options = {"last": last, "scale": scale, "window": case.window}
    kernels.score_keys(given.q, lse, given.k, given.slots, actual, **options)
    twins.score_keys(given.q, lse, given.k, given.slots, expected, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    weights = min(last, len(case.rows)) * shape.heads
    torch.testing.assert_close((actual - start).sum().item(), float(weights), rtol=1e-3, atol=1e-3)


def check_layers(attending: ModuleType, scoring: ModuleType, case: Case, shape: Shape, device: str) -> None:
    """The same rows at three layers in one call against one call each, for attention and what keys are paid."""
    given = attend_inputs(case, shape, torch.float16, device)
    generator = torch.Generator().manual_seed(2)
    kv = torch.randn((3, 2, *given.k.shape), generator=generator).to(given.k)
    queries = torch.randn((3, *given.q.shape), generator=generator).to(given.q)
    options = {"scale": shape.head_dim**-0.5, "window": case.window}
    k, v, stride = kv[0, 0], kv[0, 1], kv.stride(0)
    out, lse = attending.attend(queries, k, v, given.slots, layer_stride=stride, **options)
    scores, expected = (torch.zeros(case.length, device=device) for _ in range(2))
    scoring.score_keys(queries, lse, k, given.slots, scores, last=2, layer_stride=stride, **options)
    for layer, q in enumerate(queries):
        one, one_lse = attending.attend(q, *kv[layer], given.slots, **options)
        close(out[layer], one, torch.float16)
        close(lse[layer], one_lse, torch.float16)
        scoring.score_keys(q, one_lse, kv[layer, 0], given.slots, expected, last=2, **options)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


class Rotation(NamedTuple):
    """``turning``: rotary dimensions, 0 for a layer without RoPE."""

    shape: Shape
    turning: int
    normed: bool


ROTATIONS = {
    "llama": Rotation(Shape(4, 2, 64), 64, False),
    "qwen3": Rotation(Shape(6, 2, 128), 128, True),
    "padded": Rotation(Shape(20, 4, 24), 24, True),
    "partial": Rotation(Shape(4, 2, 96), 48, True),
    "partial-plain": Rotation(Shape(3, 1, 80), 32, False),
    "no-rope": Rotation(Shape(4, 2, 64), 0, False),
    "no-rope-normed": Rotation(Shape(4, 2, 96), 0, True),
}


def check_rope_write(kernels: ModuleType, rotation: Rotation, dtype: torch.dtype, device: str) -> None:
    """Rounded after every operation, as the library does: bit for bit on a CPU, while chips fuse products and sums."""
    shape, rows, length = rotation.shape, 5, 40
    generator = torch.Generator().manual_seed(0)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn((rows, width), generator=generator).to(dtype).to(device)
    angle = 40 * torch.rand((rows, rotation.turning // 2), generator=generator)
    both = torch.cat((angle, angle), dim=-1)
    rotary = (both.cos().to(dtype).to(device), both.sin().to(dtype).to(device)) if rotation.turning else None
    norms = None
    if rotation.normed:
        q_weight, k_weight = (torch.rand(shape.head_dim, generator=generator).to(dtype).to(device) for _ in range(2))
        norms = (q_weight, k_weight)
    slots = torch.tensor([0, 3, 17, 18, 39], device=device)
    results = []
    for module in (kernels, twins):
        out = torch.full((rows, shape.heads, shape.head_dim), float("nan"), dtype=dtype, device=device)
        kv = torch.full((2, length, shape.kv_heads, shape.head_dim), 7.0, dtype=dtype, device=device)
        module.rope_write(qkv, rotary, norms, slots, out, kv[0], kv[1], eps=1e-5)
        results.append((out, kv))
    untouched = torch.ones(length, dtype=torch.bool, device=device)
    untouched[slots] = False
    assert (results[0][1][:, untouched] == 7.0).all()
    for actual, expected in zip(*results, strict=True):
        if device != "cpu" or dtype == torch.float32 or rotation.normed:
            close(actual, expected, dtype)
        else:
            assert torch.equal(actual, expected)


def check_rms_norm(kernels: ModuleType, width: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn((5, width), generator=generator)).to(dtype).to(device)
    weight = torch.rand(width, generator=generator).to(dtype).to(device)
    actual, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-5, actual)
    twins.rms_norm(x, weight, 1e-5, expected)
    close(actual, expected, dtype)


def check_silu_mul(kernels: ModuleType, width: int, dtype: torch.dtype, device: str) -> None:
    gate_up = (4 * torch.randn((3, 2 * width), generator=torch.Generator().manual_seed(0))).to(dtype).to(device)
    gate_up[0, 0], gate_up[1, 1] = -200.0, 200.0
    up = gate_up[:, width:].clone()
    expected = twins.silu_mul(gate_up.clone())
    actual = kernels.silu_mul(gate_up)
    close(actual, expected, dtype)
    assert actual.data_ptr() == gate_up.data_ptr()
    assert torch.equal(gate_up[:, width:], up)


def check_weigh(kernels: ModuleType, length: int, device: str) -> None:
    """Scores of either sign, and some that are no numbers; some places are certain, some barred."""
    generator = torch.Generator().manual_seed(length)
    scores, weights = torch.randn(length, generator=generator), torch.rand(length, generator=generator)
    fates = torch.randint(9, (3, length), generator=generator)
    scores[fates[0] == 0], scores[fates[0] == 1], scores[fates[0] == 2] = float("nan"), float("inf"), float("-inf")
    weights[fates[1] == 0], weights[fates[1] == 1], weights[fates[2] == 0] = float("inf"), -1.0, 0.0
    expected = twins.weigh(scores, weights)
    assert torch.equal(kernels.weigh(scores.to(device), weights.to(device)).cpu(), expected)
    assert torch.equal(expected == float("inf"), weights == float("inf"))
    assert torch.equal(expected == float("-inf"), weights < 0)


def check_start_rows(
    kernels: ModuleType, width: int, rotary: int, places: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((50, width), generator=generator).to(device, dtype)
    angles = tuple(torch.randn((300, rotary), generator=generator).to(device, dtype) for _ in range(2))
    prompt = torch.randint(50, (300,), generator=generator).to(device)
    chosen = torch.randperm(300, generator=generator)[:places].sort().values.to(device)
    for rows in (places, places + 7):
        results = []
        for each in (kernels, twins):
            parts = [torch.full((rows, n), 9.0, device=device, dtype=dtype) for n in (width, rotary, rotary)]
            slots = torch.full((rows,), -1, device=device)
            each.start_rows(prompt, chosen, embedding, angles, parts[0], (parts[1], parts[2]), slots)
            results.append([*parts, slots])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def check_slabs(codec: str, shape: Shape, turning: int, dtype: torch.dtype) -> None:
    """Chunks of several lengths against unpacking, rotating and writing one by one."""
    lengths, first, length = [5, 1, 37, 70], [2, 9, 11, 60], 140
    kv_shape = KvShape(1, shape.kv_heads, shape.head_dim, dtype)
    slabs = [_at_64(encoded(random_kv(kv_shape, n, seed=n), codec)) for n in lengths]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(first, lengths, strict=True)])
    rope = Rope(10_000.0 ** (-torch.arange(turning // 2) / max(turning / 2, 1)), (True, False), None)
    angles = rope.angles(positions)
    unpacker = Unpacker(codec, kv_shape, lengths, torch.device("cpu"))
    stage = np.zeros(unpacker.nbytes, np.uint8)
    for slab, pieces in zip(slabs, unpacker.pieces, strict=True):
        for to, source in pieces:
            stage[to] = slab[source]
    keys, values = unpacker.unpack(torch.from_numpy(stage))
    table = span_table(codec, kv_shape, lengths, first, first)
    placer = SlabPlacer(codec, kv_shape, table, max(lengths), rope.table(length))
    sources = torch.tensor([[*(slab.ctypes.data for slab in slabs), 0]])
    for layer, together in ((0, 1), (1, 1), (0, 2)):
        kv = torch.full((together, 2, length, shape.kv_heads, shape.head_dim), 7.0, dtype=dtype)
        expected = kv.clone()
        expected[:, 0, positions], expected[:, 1, positions] = rope.place(keys, angles, layer), values
        table, stride = sources.expand(together, -1).contiguous(), kv.stride(0)
        placer.place(table, kv[0, 0], kv[0, 1], rotated=rope.rotates[layer], layer_stride=stride)
        close(kv, expected, dtype)


def _at_64(slab: np.ndarray) -> np.ndarray:
    """The same bytes at an address that is a multiple of 64, as the store's buffers and stages are."""
    memory = np.empty(slab.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned: np.ndarray = memory[start : start + slab.nbytes]
    aligned[:] = slab
    return aligned
