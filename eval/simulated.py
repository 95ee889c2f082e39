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
        at: seconds since the start, or since the end of the request that it comes after.
        cached_tokens: of its prompt, that need not be computed.
        after: the place, among all requests, of the turn before it in a conversation, with which its prompt begins.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cached_tokens: int = 0
    after: int | None = None


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        came: seconds since the start.
        prefilled: when a prefill ended and gave a token, its first before all others.
        spans: (first step, steps) that gave one each.
    """

    request: SimRequest
    came: float = 0.0
    refused: bool = False
    preemptions: int = 0
    prefilled: list[float] = field(default_factory=list)
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
    step_ends: seconds, of every step of decoding.
    copied_blocks, loaded_blocks: to RAM and back.
    found_tokens: of prompts, left by the turn before.
    busy_s: time in which anything was computed, of ``ended``.
    """

    outcomes: list[Outcome]
    step_ends: Floats
    samples: list[Sample]
    copied_blocks: int
    loaded_blocks: int
    found_tokens: int
    busy_s: float
    ended: float

    def token_times(self, outcome: Outcome) -> Floats:
        spans = (self.step_ends[first : first + n] for first, n in outcome.spans)
        return np.sort(np.concatenate([outcome.prefilled, *spans]))

    def ttft(self, tenants: Iterable[str] | None = None) -> Floats:
        """Seconds to the first token of every request that was served."""
        return np.array([o.prefilled[0] - o.came for o in self._of(tenants) if o.prefilled])

    def tbt(self, tenants: Iterable[str] | None = None) -> Floats:
        """Seconds between tokens."""
        return np.concatenate([np.empty(0), *(np.diff(self.token_times(o)) for o in self._of(tenants))])

    @property
    def preemptions(self) -> int:
        return sum(outcome.preemptions for outcome in self.outcomes)

    @property
    def throughput(self) -> float:
        """Tokens of output a second."""
        tokens = sum(len(self.token_times(outcome)) for outcome in self.outcomes)
        return tokens / self.ended if tokens else 0.0

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
