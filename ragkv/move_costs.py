"""Moved or computed again: what is sooner for KV that is not on the device, as measured."""

from __future__ import annotations

from collections import Counter

from ragkv.durations import Durations
from ragkv.lane import Lane
from ragkv.paged import BLOCK_TOKENS

# How much sooner the other way must be to change to it.
CLEARLY = 1.25
# After so many times of computing, a few blocks are moved all the same: that may have become faster meanwhile.
TRIED_AFTER = 16
TRIED_BLOCKS = 8


class Choice:
    """Whether to move, or to compute again. It moves until both were measured, and does not waver."""

    def __init__(self) -> None:
        self._moves = True
        self._computed = 0

    def blocks(self, count: int, moving: float | None, computing: float | None) -> int:
        """How many of ``count`` blocks to move, where moving all takes ``moving`` seconds and none ``computing``."""
        if moving is None or computing is None:
            return count
        self._moves = moving <= computing * (CLEARLY if self._moves else 1 / CLEARLY)
        self._computed = 0 if self._moves else self._computed + 1
        if self._moves:
            return count
        return min(count, TRIED_BLOCKS) if self._computed % TRIED_AFTER == 0 else 0


class MoveCosts:
    """Chooses for blocks that a conversation wants back, or that would be copied for it.

    What the lanes take they have measured, with what they were asked before; what computing takes the engine tells.

    Args:
        out, back: from the device to RAM, and from there to the device.
        disk: from disk to RAM.

    Attributes:
        counts: blocks by what became of them: ``kept`` on the device until they were wanted, ``loaded`` from RAM,
            ``recomputed`` although they were in RAM or on disk, ``uncopied`` when their place was given up.
    """

    def __init__(self, out: Lane, back: Lane, disk: Lane | None) -> None:
        self._out, self._back, self._disk = out, back, disk
        self._computing = Durations()
        self._storing, self._loading, self._fetching = Choice(), Choice(), Choice()
        self.counts = Counter(kept=0, loaded=0, recomputed=0, uncopied=0)

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill of ``tokens`` tokens took ``seconds``."""
        if tokens > 0:
            self._computing.observe(tokens, seconds)

    def storing(self, blocks: int, tokens: int) -> int:
        """How many of ``blocks`` to copy to RAM, without which ``tokens`` tokens are computed again."""
        moving = _both(self._out.seconds(blocks), self._back.seconds(blocks))
        chosen = self._storing.blocks(blocks, moving, self._computing.seconds(tokens))
        self.counts["uncopied"] += blocks - chosen
        return chosen

    def loading(self, blocks: int, tokens: int) -> int:
        """How many of ``blocks`` to bring from RAM, without which ``tokens`` tokens are computed again."""
        return self._loading.blocks(blocks, self._back.seconds(blocks), self._computing.seconds(tokens))

    def fetching(self, blocks: int, tokens: int) -> int:
        """How many of ``blocks`` to read from disk; without them ``tokens`` tokens are to be computed."""
        if self._disk is None:
            return 0
        most, least = self._computing.seconds(tokens), self._computing.seconds(tokens - blocks * BLOCK_TOKENS)
        computing = most - least if most is not None and least is not None else None
        moving = _both(self._disk.seconds(blocks), self._back.seconds(blocks))
        chosen = self._fetching.blocks(blocks, moving, computing)
        self.counts["recomputed"] += blocks - chosen
        return chosen


def _both(one: float | None, other: float | None) -> float | None:
    return one + other if one is not None and other is not None else None
