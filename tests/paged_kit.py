"""What decoding's kernels and its fused loop must do, as checks that run on any device."""

from __future__ import annotations

from types import ModuleType

import torch

from ragkv.decoding import Decoder
from ragkv.kernels import twins
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.runner import ModelRunner
from tests.fused_kit import near, runners
from tests.kernels_kit import Shape, close

PAGED_SHAPES = [Shape(4, 2, 64), Shape(6, 2, 96), Shape(8, 1, 128), Shape(3, 3, 80)]
POSITIONS = [0, 299, 15, 130, 16]
LANES = [1, 0, 4, 3]


def check_attend_paged(
    kernels: ModuleType, shape: Shape, dtype: torch.dtype, device: str, splits: int | None, window: int | None
) -> None:
    """Scattered blocks; what lies behind a row's position is NaN. Twice: what counts arrivals must begin anew."""
    generator = torch.Generator().manual_seed(0)
    order = (torch.randperm(59, generator=generator) + 1).int()
    pool = torch.full((60, 2, shape.kv_heads, BLOCK_TOKENS, shape.head_dim), float("nan"))
    tables, used = torch.zeros((len(POSITIONS), 20), dtype=torch.int32), 0
    for lane, position in enumerate(POSITIONS):
        for number in range(position // BLOCK_TOKENS + 1):
            tables[lane, number] = block = order[used]
            filled = min(BLOCK_TOKENS, position + 1 - number * BLOCK_TOKENS)
            pool[block, :, :, :filled] = torch.randn(2, shape.kv_heads, filled, shape.head_dim, generator=generator)
            used += 1
    data = pool.to(device, dtype).transpose(2, 3)
    q = (2 * torch.randn((len(LANES), shape.heads, shape.head_dim), generator=generator)).to(device, dtype)
    lanes, positions = (torch.tensor(each, dtype=torch.int32, device=device) for each in (LANES, POSITIONS))
    given = (q, data[:, 0], data[:, 1], tables.to(device), lanes, positions)
    room = kernels.PagedRoom(q, shape.kv_heads, splits=splits)
    expected = twins.attend_paged(*given, scale=shape.head_dim**-0.5, window=window)
    for _ in range(2):
        for filled in (room.out, room.part, room.part_lse):
            filled.fill_(float("nan"))
        out = kernels.attend_paged(*given, scale=shape.head_dim**-0.5, window=window, room=room)
        close(out, expected, dtype)


def check_product(kernels: ModuleType, width: int, outputs: int, case: str, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    gated = case == "gated"
    x, weight = random(1, width), random(outputs * (1 + gated), width) / width**0.5
    options = {
        "plain": {},
        "normed": {"norm": random(width), "eps": 1e-5},
        "gated": {"norm": random(width), "eps": 1e-5, "gated": True},
        "added": {"added": True},
        "biased": {"bias": random(outputs)},
    }[case]
    actual = random(1, outputs) if case == "added" else torch.full((1, outputs), float("nan")).to(device, dtype)
    expected = actual.clone()
    kernels.product(x, weight, actual, **options)
    twins.product(x, weight, expected, **options)
    assert torch.isfinite(actual).all()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


@torch.inference_mode()
def check_loops(name: str, dtype: torch.dtype, device: str) -> None:
    """Fused and plain on the same KV: lanes leave, enter elsewhere and grow. The same tokens go into both."""
    results = []
    for runner in runners(name, dtype, device):
        decoder = _new(runner)
        steps = [([2, 0, 3], 3), ([3, 2], 2), ([1, 3, 2], 12), ([1], 2)]
        lengths = [5, 16, 31, 47]
        tables = [[20, 3], [1, 22], [9, 8, 7, 0], [10, 11, 12, 13, 14]]
        for lane in (2, 0, 3):
            decoder.enter(lane, 7 + lane, lengths[lane], tables[lane])
        logits = []
        for number, (lanes, count) in enumerate(steps):
            if number == 2:
                decoder.left(0)
                decoder.enter(1, 9, lengths[1], tables[1])
                decoder.extend(1, [4])
            for step in range(count):
                logits.append(decoder.step(lanes).clone())
                decoder.put_tokens(lanes, torch.tensor([(11 * step + lane) % 256 for lane in lanes], device=device))
        results.append(torch.cat(logits))
    near(results[0], results[1], dtype)


def _new(runner: ModelRunner) -> Decoder:
    pool = PagedKV(runner.shape, 24, runner.device)
    # The same numbers at the same places, whatever the layout.
    generator = torch.Generator().manual_seed(1)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    decoder = Decoder(runner, pool, lanes=4, max_tokens=80)
    assert decoder.runs == ("plain" if runner.fused is None else "fused")
    return decoder
