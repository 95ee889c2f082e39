"""What this machine gives at best, and the least time a prefill could take on it: the floor of every TTFT row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ragkv.eval.disk import raw_read
from ragkv.plan import PromptPlan
from ragkv.prefill import SpanOutcome
from ragkv.runner import ModelRunner

_REPEATS = 7
_DISK_REPEATS = 3
_COPIED_BYTES = 128 << 20
_LEAST_MATRIX_FLOPS = {"cpu": 2e10, "cuda": 4e12}


@dataclass(frozen=True)
class Rates:
    """Best of several tries, measured in the run they are used in; all in bytes or operations a second.

    Attributes:
        flops: matrix product of the model's own sizes in its dtype.
        memory: reading and writing the device's memory.
        link: from page-locked host memory to the device; None where that is the host.
        tiers: reading stored chunks from each tier. Device: its memory; RAM: the link where there is one, which reads
            page-locked memory where it lies, else copying memory; SSD:
            :func:`ragkv.eval.disk.raw_read`.
    """

    flops: float
    memory: float
    link: float | None
    tiers: dict[str, float]

    def best(self, other: Rates) -> Rates:
        """The faster of two measurements, one by one."""
        link = None if self.link is None else max(self.link, other.link or 0.0)
        tiers = {name: max(rate, other.tiers[name]) for name, rate in self.tiers.items()}
        return Rates(max(self.flops, other.flops), max(self.memory, other.memory), link, tiers)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What a prefill cannot do without.

    Attributes:
        tier_bytes: stored KV that is read from the tier and, unless it is the device's own, crosses the link.
        memory_bytes: weights and KV that the device reads.
        flops: of all computed rows, attention counted to each row's own causal limit.
    """

    tier_bytes: int
    memory_bytes: int
    flops: float

    def floor_s(self, tier: str, rates: Rates) -> dict[str, float]:
        """Seconds each resource needs at the least; all at the same time, so the floor is the largest."""
        return {
            "tier": self.tier_bytes / rates.tiers[tier],
            "link": self.tier_bytes / rates.link if rates.link and tier != "device" else 0.0,
            "memory": self.memory_bytes / rates.memory,
            "chip": self.flops / rates.flops,
        }


def work_of(runner: ModelRunner, plan: PromptPlan, outcomes: Sequence[SpanOutcome], tier_bytes: int) -> Work:
    """The work of a prefill with these ``outcomes``, in the order of the plan's spans.

    A chunk's recomputed rows count as if they stood in its middle. A selector's own passes are no part of it. In the
    last layer, rows but the prompt's last one need keys and values only.
    """
    computed = [
        (span.start, span.end, outcome.token_layers) for span, outcome in zip(plan.spans, outcomes, strict=True)
    ]
    shape, length, first = runner.shape, len(plan.ids), plan.spans[0].start if plan.spans else plan.question_start
    computed += [(a, b, (b - a) * shape.layers) for a, b in ((0, first), (plan.question_start, length))]
    linear = sum(weight.numel() for weight in _matrices(runner)) / shape.layers
    beside_kv = linear - 2 * int(runner.config.hidden_size) * shape.kv_heads * shape.head_dim
    head = runner.model.lm_head.weight
    width = 4 * int(runner.config.num_attention_heads) * shape.head_dim
    windows = [getattr(layer.self_attn, "sliding_window", None) or length for layer in runner.decoder.layers]
    flops = 2 * (head.numel() + beside_kv) + width * min(length, windows[-1])
    for start, end, token_layers in computed:
        seen = [min((start + end + 1) / 2, window) for window in windows[:-1]]
        a_row = 2 * (shape.layers * linear - beside_kv) + width * sum(seen)
        flops += token_layers / shape.layers * a_row
    kv = shape.entry_bytes(length, "raw")
    weights = int(linear * shape.layers + head.numel()) * head.itemsize
    return Work(tier_bytes, weights + kv, flops)


def _matrices(runner: ModelRunner) -> list[torch.Tensor]:
    return [weight for layer in runner.decoder.layers for weight in layer.parameters() if weight.dim() > 1]


def matrix_rate(runner: ModelRunner) -> float:
    """FLOP/s of the model's widest product, over as many rows as make it worth while."""
    hidden, wide = int(runner.config.hidden_size), int(runner.config.intermediate_size)
    rows = max(512, round(_LEAST_MATRIX_FLOPS[runner.device.type] / (2 * hidden * wide)) // 64 * 64)
    x = torch.randn(rows, hidden, device=runner.device).to(runner.shape.dtype)
    weight = torch.randn(wide, hidden, device=runner.device).to(runner.shape.dtype)
    return 2 * rows * hidden * wide / _best(runner, lambda: torch.nn.functional.linear(x, weight))


def memory_rate(runner: ModelRunner) -> float:
    """Bytes/s that the device's memory reads and writes."""
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=runner.device) for _ in range(2))
    return 2 * _COPIED_BYTES / _best(runner, lambda: target.copy_(source))


def link_rate(runner: ModelRunner) -> float | None:
    """Bytes/s from page-locked memory to the device, None on a CPU."""
    if runner.device.type == "cpu":
        return None
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=runner.device)
    return _COPIED_BYTES / _best(runner, lambda: target.copy_(source, non_blocking=True))


def ram_rate() -> float:
    """Bytes/s of a copy within the host's memory."""
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
    return _COPIED_BYTES / _best(None, lambda: target.copy_(source))


def disk_rate(files: Sequence[Path]) -> float:
    """Bytes/s of reading ``files`` past the page cache."""
    passes = [raw_read(files) for _ in range(_DISK_REPEATS)]
    return max(one.nbytes / one.seconds for one in passes)


def _best(runner: ModelRunner | None, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries: a floor takes the machine at its best."""
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        if runner is not None:
            runner.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
