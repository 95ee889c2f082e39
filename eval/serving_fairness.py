"""Fairness between tenants: their service while they are backlogged (Sheng et al., OSDI 2024).

Service counts 1 for every prompt token that was computed, when the first token comes, and 2 for every token of a reply,
over the tenant's weight. A tenant is backlogged while a request of its has come and has no token yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ragkv.eval.serving_drive import Drive, Life

Interval = tuple[float, float]
_LEAST_SHARE = 0.02


class Service:
    """A tenant's: ``times`` (events,) and what was served up to and with each, in ``totals`` (events,)."""

    def __init__(self, lives: Sequence[Life], until: float) -> None:
        events = sorted(event for life in lives for event in _events(life))
        self.times = np.array([at for at, _ in events])
        self.totals = np.cumsum([amount for _, amount in events]) if events else np.zeros(0)
        waits = ((life.due, life.times[0] if life.times else life.ended or until) for life in lives)
        self.backlogged = merged((start, min(end, until)) for start, end in waits)

    def at(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """What was served up to each of ``times``."""
        totals: NDArray[np.float64] = np.concatenate([[0.0], self.totals])
        return totals[np.searchsorted(self.times, times, side="right")]


def _events(life: Life) -> Iterable[tuple[float, float]]:
    weight = life.ask.weight
    for place, at in enumerate(life.times):
        computed = life.prompt_tokens - life.known_tokens if place == 0 else 0
        yield at, (computed + 2) / weight


def services(drive: Drive) -> dict[str, Service]:
    tenants = dict.fromkeys(sorted(life.ask.tenant for life in drive.lives))
    return {t: Service([life for life in drive.lives if life.ask.tenant == t], drive.ended) for t in tenants}


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Overlapping ones as one, in order; empty ones are left out."""
    result: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def common(ones: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Where both lists, each without overlaps, have an interval."""
    return merged((max(a, c), min(b, d)) for a, b in ones for c, d in others)


def largest_gap(by_tenant: dict[str, Service]) -> float | None:
    """By how much the services of two tenants differed at most over any time in which both were backlogged throughout;
    None when no two ever were."""
    gaps = [_gap(one, other, i) for one, other in combinations(by_tenant.values(), 2)
            for i in common(one.backlogged, other.backlogged)]  # fmt: skip
    return max(gaps, default=None)


def _gap(one: Service, other: Service, interval: Interval) -> float:
    times = np.concatenate([one.times, other.times, interval])
    within = times[(times >= interval[0]) & (times <= interval[1])]
    ahead = one.at(within) - other.at(within)
    return float(ahead.max() - ahead.min())


def jain_index(by_tenant: dict[str, Service], seconds: float) -> float | None:
    """Jain's index of the tenants' services while all were backlogged; None when that was less than 2% of the run, or
    there is only one."""
    every = list(by_tenant.values())
    if len(every) < 2:
        return None
    together = every[0].backlogged
    for service in every[1:]:
        together = common(together, service.backlogged)
    if sum(end - start for start, end in together) < _LEAST_SHARE * seconds:
        return None
    edges = np.array(together)
    served = np.array([(service.at(edges[:, 1]) - service.at(edges[:, 0])).sum() for service in every])
    return float(served.sum() ** 2 / (len(served) * (served**2).sum())) if served.any() else None
