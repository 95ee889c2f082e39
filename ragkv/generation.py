"""One request inside the engine: what it wants, what became of it, and how the outside hears of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ragkv.clock import Stopwatch
from ragkv.lineage import ALL, Lineage
from ragkv.plan import PromptPlan
from ragkv.prefill import SpanOutcome
from ragkv.sampling import SamplingParams
from ragkv.types import FinishReason, Forecast


@dataclass(frozen=True)
class TokenScores:
    """Log probability of a token that was chosen, and the most probable (token, log probability) in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Generation:
    """A planned request on its way through the engine.

    The engine thread calls ``on_token`` for every token, with its log probabilities if they were asked for, and then
    exactly one of ``on_finish`` and ``on_error``; these must not block. ``stop`` may be set from any thread at any
    moment. ``as_asked``: no controller may choose something else than ``strategy`` and ``ratio``, and no other request
    finds its KV. ``lineage`` says whose KV it may share, and once the prompt stands, how much of its own is exact.
    ``remembered``: a next turn may come and ask for all of it.
    """

    id: str
    plan: PromptPlan
    strategy: str
    ratio: float
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    watch: Stopwatch
    on_token: Callable[[int, TokenScores | None], None]
    on_finish: Callable[[FinishReason], None]
    on_error: Callable[[Exception], None]
    seed: int = 0
    as_asked: bool = False
    remembered: bool = True
    lineage: Lineage = field(default_factory=Lineage)
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    outcomes: list[SpanOutcome] = field(default_factory=list)
    forecast: Forecast | None = None
    ttft_ms: float = 0.0
    known_tokens: int = 0
    preemptions: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def askable(self) -> int:
        """Of how many tokens, from the first on, somebody may ask for the KV once it is over."""
        if self.remembered:
            return ALL
        return 0 if self.as_asked else self.lineage.exact

    @property
    def cancelled(self) -> bool:
        return self.stop.is_set()
