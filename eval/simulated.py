"""What came of a simulation: times of requests, service of tenants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SimRequest:
    """A request to come.

    Args:
        at: seconds since the start.
        cached_tokens: of its prompt, that need not be computed.
        session: turns of one conversation, whose prompts begin with what the turn before left; "": none.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cached_tokens: int = 0
    session: str = ""


@dataclass
class Outcome:
    """What became of a request. ``spans``: (first step, steps) in which it got a token each."""

    request: SimRequest
    refused: bool = False
    preemptions: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """Service of every tenant so far, and who waited without a break since the last sample."""

    at: float
    service: dict[str, int]
    backlogged: frozenset[str]


@dataclass(frozen=True)
class SimResult:
    """Attributes:
    step_ends: seconds, of every step.
    swapped_blocks: out and in.
    busy_s: time in steps; the rest of ``step_ends[-1]`` nothing ran.
    """

    outcomes: list[Outcome]
    step_ends: Floats
    samples: list[Sample]
    swapped_blocks: int
    busy_s: float

    def token_times(self, outcome: Outcome) -> Floats:
        return np.concatenate([np.empty(0), *(self.step_ends[first : first + n] for first, n in outcome.spans)])

    def ttft(self, tenants: Iterable[str] | None = None) -> Floats:
        """Seconds to the first token of every request that was served."""
        served = [o for o in self._of(tenants) if o.spans]
        return np.array([self.step_ends[o.spans[0][0]] - o.request.at for o in served])

    def tbt(self, tenants: Iterable[str] | None = None) -> Floats:
        """Seconds between tokens."""
        return np.concatenate([np.empty(0), *(np.diff(self.token_times(o)) for o in self._of(tenants))])

    @property
    def preemptions(self) -> int:
        return sum(outcome.preemptions for outcome in self.outcomes)

    @property
    def throughput(self) -> float:
        """Tokens of output a second."""
        tokens = sum(n for outcome in self.outcomes for _, n in outcome.spans)
        return tokens / float(self.step_ends[-1]) if tokens else 0.0

    def largest_gap(self) -> float:
        """By how much service ÷ weight of any two tenants differed over any time in which both were backlogged."""
        weights = self._weights()
        return max((self._gap(a, b, weights) for a, b in combinations(weights, 2)), default=0.0)

    def jain(self) -> float | None:
        """Jain's index of service ÷ weight, (Σx)² ÷ nΣx², while all were backlogged; None if they never were."""
        weights = self._weights()
        pairs = [(a, b) for a, b in zip(self.samples, self.samples[1:], strict=False) if b.backlogged >= weights.keys()]
        shares = [
            sum(b.service[tenant] - a.service.get(tenant, 0) for a, b in pairs) / weight
            for tenant, weight in weights.items()
        ]
        squares = len(shares) * sum(share**2 for share in shares)
        return sum(shares) ** 2 / squares if squares else None

    def _gap(self, one: str, other: str, weights: dict[str, float]) -> float:
        widest, low, high = 0.0, np.inf, -np.inf
        for before, sample in zip(self.samples, self.samples[1:], strict=False):
            if not {one, other} <= sample.backlogged:
                low, high = np.inf, -np.inf
                continue
            for at in (before, sample):
                lead = at.service.get(one, 0) / weights[one] - at.service.get(other, 0) / weights[other]
                low, high = min(low, lead), max(high, lead)
            widest = max(widest, high - low)
        return widest

    def _of(self, tenants: Iterable[str] | None) -> list[Outcome]:
        if tenants is None:
            return self.outcomes
        wanted = set(tenants)
        return [outcome for outcome in self.outcomes if outcome.request.tenant in wanted]

    def _weights(self) -> dict[str, float]:
        return {outcome.request.tenant: outcome.request.weight for outcome in self.outcomes}
