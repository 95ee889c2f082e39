"""What the engine thread did with its time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_KEPT_RECORDS = 100_000


@dataclass(frozen=True)
class StepRecord:
    """What one turn did: decode ``rows`` that saw ``kv_tokens``, and about ``prefill_tokens`` of prompts."""

    rows: int
    kv_tokens: int
    prefill_tokens: float
    seconds: float


@dataclass
class Tally:
    """Sums over the engine's whole life, and the last steps."""

    steps: int = 0
    step_seconds: float = 0.0
    scheduler_seconds: float = 0.0
    idle_seconds: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    tokens: int = 0
    records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_KEPT_RECORDS))
