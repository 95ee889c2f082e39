"""Merging rankings that have no common scale."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def reciprocal_rank_fusion(
    rankings: Mapping[str, Sequence[Item]], *, k: int = 60, weights: Mapping[str, float] | None = None
) -> list[tuple[Item, float, dict[str, int]]]:
    """``score(d) = Σ weight / (k + rank(d))`` over the rankings that hold ``d``; weights are 1 unless given.

    Cormack, Clarke & Büttcher, SIGIR 2009, where there are no weights.

    Returns (item, score, its rank in each named ranking), best first; ranks count from 1. Equal scores are
    ordered by the best single rank, then by the order of ``rankings``.
    """
    ranks: dict[Item, dict[str, int]] = {}
    for name, ranking in rankings.items():
        for rank, item in enumerate(ranking, start=1):
            ranks.setdefault(item, {})[name] = rank
    votes = dict.fromkeys(rankings, 1.0) | dict(weights or {})
    fused = [(item, sum(votes[name] / (k + rank) for name, rank in own.items()), own) for item, own in ranks.items()]
    # The sort is stable, and ``ranks`` was filled ranking by ranking.
    return sorted(fused, key=lambda entry: (-entry[1], min(entry[2].values())))
