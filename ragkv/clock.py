"""Where a request's time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable


class Stopwatch:
    """Cuts time into named parts without gaps: each lap gives the time since the last one to a part.

    So the parts always add up to the time between start and the last lap.

    Attributes:
        shared: seconds of the laps in which others were served as well.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.started = self._last = clock()
        self.parts: dict[str, float] = defaultdict(float)
        self.shared = 0.0

    def lap(self, part: str, *, shared: bool = False) -> None:
        now = self._clock()
        self.parts[part] += now - self._last
        if shared:
            self.shared += now - self._last
        self._last = now

    def ms(self, part: str) -> float:
        return self.parts.get(part, 0.0) * 1000

    @property
    def total_ms(self) -> float:
        """From the start to the last lap."""
        return (self._last - self.started) * 1000
