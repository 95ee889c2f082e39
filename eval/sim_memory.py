"""Blocks of KV in a simulation: how many lie where, who gives way for whom, when moves are through."""

from __future__ import annotations

import heapq
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ragkv.eval.step_costs import StepCosts

BLOCK_TOKENS = 16
Preemption = Literal["recompute", "blockwise", "groups", "async", "reuse"]


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@dataclass(eq=False)
class Kept:
    """KV of ``tokens`` tokens of a conversation. Of its blocks the first ``device`` lie there, idle, and the first
    ``host`` have a copy in RAM."""

    tokens: int = 0
    device: int = 0
    host: int = 0


class Memory:
    """What :class:`ragkv.pool.KvPool` does, by numbers.

    Args:
        host_blocks: None: as many as it takes.

    Attributes:
        free: blocks on the device that hold nothing.
        freeing: those that will be free once they are copied.
        copied, loaded: blocks, to RAM and back.
        stall: seconds of moves that everybody waits for.
    """

    def __init__(self, blocks: int, host_blocks: int | None, preemption: Preemption, costs: StepCosts) -> None:
        self.free, self.freeing, self.copied, self.loaded, self.stall = blocks, 0, 0, 0, 0.0
        self._host_free = sys.maxsize if host_blocks is None else host_blocks
        self._preemption, self._costs = preemption, costs
        self._idle: dict[Kept, None] = {}  # on the device, the one that was used last at the end
        self._host_idle: dict[Kept, None] = {}  # in RAM, of conversations that nobody goes on with
        self._idle_blocks = 0
        self._leaving: list[tuple[float, int]] = []  # (when, blocks)
        self._links = {"in": 0.0, "out": 0.0}

    @property
    def available(self) -> int:
        return self.free + self._idle_blocks

    @property
    def next_free(self) -> float:
        """When blocks that are being copied will be free."""
        return self._leaving[0][0] if self._leaving else np.inf

    def land(self, now: float) -> None:
        while self.next_free <= now:
            _, blocks = heapq.heappop(self._leaving)
            self.free, self.freeing = self.free + blocks, self.freeing - blocks

    def take(self, blocks: int) -> None:
        """For use. What lay idle longest gives way, its last blocks first."""
        while self.free < blocks:
            kept = next(iter(self._idle))
            gone = min(kept.device, blocks - self.free)
            kept.device -= gone
            self.free, self._idle_blocks = self.free + gone, self._idle_blocks - gone
            if not kept.device:
                del self._idle[kept]
        self.free -= blocks

    def bring(self, kept: Kept, blocks: int, now: float) -> tuple[int, float]:
        """Have it on the device, in ``blocks`` in all. Returns how many tokens of it were anywhere, and when they are
        there."""
        there = max(kept.device, kept.host)
        missing = there - kept.device
        self._wake(kept)
        self.take(blocks)
        if self._preemption != "reuse":
            self._host_free += kept.host
            kept.host = 0
        self.loaded += missing
        return min(kept.tokens, there * BLOCK_TOKENS), self._arrival("in", missing, now) if missing else now

    def park(self, kept: Kept, held: int, now: float) -> None:
        """Its request, which had ``held`` blocks, was preempted."""
        used = blocks_of(kept.tokens)
        if self._preemption == "reuse":
            self._copy(kept, kept.tokens // BLOCK_TOKENS)  # when they were full, beside the steps
        leaving = self._copy(kept, used)
        self._rest(kept, used - leaving, held - leaving)
        if leaving:
            heapq.heappush(self._leaving, (self._arrival("out", leaving, now), leaving))
            self.freeing += leaving

    def close(self, kept: Kept, held: int) -> None:
        """The turn is over: its whole blocks stay until their room is wanted."""
        whole = kept.tokens // BLOCK_TOKENS
        if self._preemption == "reuse":
            self._copy(kept, whole)
        self._host_free += max(0, kept.host - whole)
        kept.tokens, kept.host = whole * BLOCK_TOKENS, min(kept.host, whole)
        self._rest(kept, whole, held)
        if kept.host:
            self._host_idle[kept] = None

    def _rest(self, kept: Kept, idle: int, held: int) -> None:
        """Of ``held`` blocks, ``idle`` hold something still."""
        kept.device = idle
        self.free += held - idle
        self._idle_blocks += idle
        if idle:
            self._idle[kept] = None

    def _wake(self, kept: Kept) -> None:
        self._idle.pop(kept, None)
        self._host_idle.pop(kept, None)
        self.free, self._idle_blocks = self.free + kept.device, self._idle_blocks - kept.device
        kept.device = 0

    def _copy(self, kept: Kept, blocks: int) -> int:
        """Have copies of so many blocks in RAM, if there is room. Returns how many were made."""
        wanted = 0 if self._preemption == "recompute" else max(0, blocks - kept.host)
        while self._host_free < wanted and self._host_idle:
            other = next(iter(self._host_idle))
            gone = min(other.host, wanted - self._host_free)
            other.host -= gone
            self._host_free += gone
            if not other.host:
                del self._host_idle[other]
        made = wanted if wanted <= self._host_free else 0
        self._host_free -= made
        kept.host += made
        self.copied += made
        return made

    def _arrival(self, way: str, blocks: int, now: float) -> float:
        """When these blocks will have moved."""
        seconds = self._costs.move(blocks, piecewise=self._preemption == "blockwise")
        if self._preemption in ("blockwise", "groups"):
            self.stall += seconds
            return now
        self._links[way] = max(self._links[way], now) + seconds
        return self._links[way]
