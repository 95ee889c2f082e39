"""Traces of priorities, as FastSwitch (Shen et al., 2024) gives its engine: every so many steps those of all live
requests are assigned anew, at random or with memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import ConfigError

PATTERNS = ("random", "markov")
CLASSES = 8
STAY = 0.8


class PriorityTrace:
    """Priorities from 0, the first, to 7, by request and update.

    ``random``: all are drawn anew, evenly. ``markov``: a request keeps its own with a probability of 0.8 and is else
    drawn anew, so who was served lately is likely to be served on. What a request gets at an update does not depend on
    who else is live, so that the runs of a comparison get the same.

    Raises:
        ConfigError: an unknown pattern.
    """

    def __init__(self, pattern: str, requests: int, seed: int) -> None:
        if pattern not in PATTERNS:
            raise ConfigError(f"priorities change in the patterns {', '.join(PATTERNS)}, not {pattern!r}")
        self._stay = STAY if pattern == "markov" else 0.0
        self._rng = np.random.default_rng([seed, 2])
        self.updates = 0
        self.now: NDArray[np.int64] = self._rng.integers(CLASSES, size=requests)

    def advance(self, updates: int) -> NDArray[np.int64]:
        """Priorities (requests,) after ``updates`` updates in all; never back."""
        while self.updates < updates:
            drawn = self._rng.integers(CLASSES, size=len(self.now))
            stays = self._rng.random(len(self.now)) < self._stay
            self.now = np.where(stays, self.now, drawn)
            self.updates += 1
        return self.now
