"""What to measure of serving, and how long each part of it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from ragkv.errors import ConfigError
from ragkv.eval.serving_drive import Drive
from ragkv.eval.serving_measures import Row, row_of
from ragkv.eval.step_costs import StepCosts
from ragkv.eval.workloads import LOADS, Shape, Workload, make_workload
from ragkv.pool import Preemption
from ragkv.scheduling import POLICIES

PREEMPTIONS = get_args(Preemption)
_OF_BUDGET = 0.92  # the rest is for warming up, and for letting go of what runs at the end
_FOREVER = 1e9
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ServingPlan:
    """What to measure: every load under every policy and preemption. A policy of "" is the load's own: ``priority``
    where priorities change, else ``vtc``.

    Args:
        max_running: in place of the setting, one after the other.
        updates: random or markov, in place of the loads' own changes of priority.
        frequency: updates of priorities per step of the engine.
        slo_ttft_ms, slo_tbt_ms: what goodput keeps.
        budget_s: seconds for everything; each run gets the same share of it.
        simulate: run everything through the simulator as well, by ``costs`` or else by those fitted to each run.

    Raises:
        ConfigError: a value that cannot be measured.
    """

    loads: tuple[str, ...] = ("sessions-priority",)
    shape: Shape = field(default_factory=Shape)
    policies: tuple[str, ...] = ("",)
    preemptions: tuple[Preemption, ...] = ("reuse",)
    max_running: tuple[int | None, ...] = (None,)
    updates: str | None = None
    frequency: float = 0.02
    slo_ttft_ms: float = 1000.0
    slo_tbt_ms: float = 50.0
    budget_s: float | None = None
    simulate: bool = False
    costs: StepCosts | None = None

    def __post_init__(self) -> None:
        named = (
            ("--load", self.loads, tuple(LOADS)),
            ("--policies", self.policies, ("", *POLICIES)),
            ("--preemptions", self.preemptions, PREEMPTIONS),
        )
        for option, chosen, known in named:
            if not chosen:
                raise ConfigError(f"{option} names nothing to measure; choose {', '.join(filter(None, known))}")
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{option}: {name!r} is not one of {', '.join(filter(None, known))}")
        if not 0 < self.frequency <= 1 or min(self.slo_ttft_ms, self.slo_tbt_ms) <= 0:
            raise ConfigError("--frequency is above 0 and at most 1; limits are above 0 ms")

    def workloads(self) -> dict[str, Workload]:
        made = {load: make_workload(load, self.shape) for load in self.loads}
        return {load: replace(w, updates=self.updates) if self.updates else w for load, w in made.items()}

    def facts(self, load: str, workload: Workload) -> Row:
        """What a row says of its load."""
        return {
            "load": load,
            "offered": len(workload.asks),
            "offered_per_s": self.shape.rate,
            "priority_updates": workload.updates,
            "update_frequency": self.frequency if workload.updates else None,
            "seed": self.shape.seed,
        }

    def measured(self, drive: Drive) -> Row:
        return row_of(drive, slo_ttft_ms=self.slo_ttft_ms, slo_tbt_ms=self.slo_tbt_ms)


class Budget:
    """Seconds for each run: an equal share, of what was there at the first one or is left now."""

    def __init__(self, seconds: float | None) -> None:
        self._until = time.perf_counter() + seconds if seconds else None
        self._fair = _FOREVER

    def share(self, runs: int) -> float:
        if self._until is None:
            return _FOREVER
        now = _OF_BUDGET * (self._until - time.perf_counter()) / runs
        self._fair = min(self._fair, now)
        return self._fair
