"""Positions and scores: what every index returns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Ranking = list[tuple[int, float]]
"""(position of the chunk in the index, score), best first."""

_DIGITS = 6  # BLAS may score equal vectors differently in the last bits; beyond these digits scores are equal


def rank(positions: NDArray[np.int64], scores: NDArray[np.float32], k: int) -> Ranking:
    """The best ``k`` of the given positions; equal scores in order of position."""
    rounded = np.round(scores.astype(np.float64), _DIGITS)
    order = np.lexsort((positions, -rounded))[:k]
    return [(int(positions[i]), float(rounded[i])) for i in order]
