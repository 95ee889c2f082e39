"""How long something takes by how much of it there is, as measured lately."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median_low

# Runs of about one size that are remembered. Their median is what counts: one that was held up by something is no news.
_REMEMBERED = 9


class Durations:
    """Seconds as a function of a size, such as a prefill's tokens.

    Runs are sorted by size into classes, each twice as wide as the one before. Straight lines lead from nothing to the
    smallest, from one to the next, and on in proportion; so what launching takes, for few as for many, is in it.
    """

    def __init__(self) -> None:
        self._runs: dict[int, deque[tuple[int, float]]] = {}
        self._knots: list[tuple[int, float]] = []

    def observe(self, size: int, seconds: float) -> None:
        """It took ``seconds`` for ``size`` of them, 1 at least."""
        self._runs.setdefault(size.bit_length(), deque(maxlen=_REMEMBERED)).append((size, seconds))
        knots, slowest = [(0, 0.0)], 0.0
        for _, runs in sorted(self._runs.items()):
            slowest = max(slowest, median_low(seconds for _, seconds in runs))  # more never takes less
            knots.append((median_low(size for size, _ in runs), slowest))
        self._knots = knots

    def seconds(self, size: int) -> float | None:
        """For ``size`` of them; None before anything was measured."""
        if not self._knots:
            return None
        at = min(max(1, bisect_left(self._knots, (size, 0.0))), len(self._knots) - 1)
        (low, below), (high, above) = self._knots[at - 1 : at + 1]
        if size > high:
            return above * size / high
        return below + (above - below) * (size - low) / (high - low)
