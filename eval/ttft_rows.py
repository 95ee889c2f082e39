"""From timed prefills to rows: medians, what they are held against, and what the machine could have done at best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.eval.machine import device_name
from ragkv.eval.rates import Rates, work_of
from ragkv.eval.ttft_bench import Run
from ragkv.eval.ttft_stores import Place
from ragkv.prefill import FULL
from ragkv.runner import ModelRunner
from ragkv.types import Method

Row = dict[str, Any]
Asked = tuple[Method, float]
Cell = tuple[Place, Asked]
FULL_CELL: Asked = ("full", 1.0)


@dataclass(frozen=True)
class Race:
    """Timed runs over one context; the first cell is ragkv's own full prefill, ``library`` (seconds, service) of the
    library's."""

    context: int
    runs: dict[Cell, list[Run]]
    library: list[tuple[float, float]]

    @property
    def own(self) -> list[Run]:
        return next(iter(self.runs.values()))


def rows_of(
    runner: ModelRunner, race: Race, places: Sequence[Place], asked: Sequence[Asked], batch: int, rates: Rates
) -> list[Row]:
    """A row for each place and each of ``asked``."""
    full = _full(runner, race, rates)
    beside = [run.seconds for run in race.own]
    if full["full_prefill_by"] == "library":
        beside = [seconds for seconds, _ in race.library]
    rows = []
    for place in places:
        for method, ratio in asked:
            runs = race.own if method == FULL else race.runs[place, (method, ratio)]
            figures = _figures(runner, place, runs, full["full_prefill_ms"], batch, rates)
            figures["later_ms"] = 1000 * statistics.median(a.seconds - b for a, b in zip(runs, beside, strict=True))
            where = {"tier": place.tier, "codec": place.codec, "context_tokens": race.context}
            rows.append({**where, "method": method, "ratio": ratio, **figures, **full, "passes": len(runs)})
    return rows


def _full(runner: ModelRunner, race: Race, rates: Rates) -> Row:
    """The faster of the two full prefills, and how much of the chip it uses."""
    seconds = {
        "library": statistics.median(one for one, _ in race.library),
        "ragkv": statistics.median(run.seconds for run in race.own),
    }
    service = {
        "library": statistics.median(one for _, one in race.library),
        "ragkv": statistics.median(run.service for run in race.own),
    }
    by = min(seconds, key=lambda name: seconds[name])
    rate = work_of(runner, race.own[0].plan, race.own[0].outcomes, 0).flops / service[by]
    return {
        "full_prefill_ms": 1000 * seconds[by],
        "full_prefill_by": by,
        "full_prefill_tflops": rate / 1e12,
        "full_prefill_of_matrix_rate": rate / rates.flops,
        "library_prefill_ms": 1000 * seconds["library"],
        "ragkv_prefill_ms": 1000 * seconds["ragkv"],
    }


def _figures(runner: ModelRunner, place: Place, runs: Sequence[Run], full_ms: float, batch: int, rates: Rates) -> Row:
    ttft = statistics.median(run.seconds for run in runs)
    typical = min(runs, key=lambda run: abs(run.seconds - ttft))
    pairs = list(zip(typical.plan.spans, typical.outcomes, strict=True))
    loaded = sum(runner.shape.entry_bytes(s.length, place.codec) for s, outcome in pairs if outcome.kv == place.tier)
    token_layers = typical.plan.context_tokens * runner.shape.layers
    floors = work_of(runner, typical.plan, typical.outcomes, loaded).floor_s(place.tier, rates)
    # The request in the middle waits for those before it.
    floors = {name: seconds * (batch + 1) / 2 for name, seconds in floors.items()}
    by = max(floors, key=lambda name: floors[name])
    return {
        "recomputed_share": sum(outcome.token_layers for outcome in typical.outcomes) / token_layers,
        "ttft_ms": 1000 * ttft,
        "full_prefill_ms": full_ms,
        "speedup": full_ms / (1000 * ttft),
        "floor_ms": 1000 * floors[by],
        "over_floor": ttft / floors[by],
        "bytes_loaded": loaded,
        "device": device_name(runner.device),
        "floor_by": by,
        "floors_ms": {name: 1000 * seconds for name, seconds in floors.items()},
        "parts_ms": {part: 1000 * seconds for part, seconds in typical.parts.items()},
        "fastest_ms": 1000 * min(run.seconds for run in runs),
        "slowest_ms": 1000 * max(run.seconds for run in runs),
        "service_ms": 1000 * statistics.median(run.service for run in runs),
        **_chosen(runs),
    }


def _chosen(runs: Sequence[Run]) -> Row:
    """What the controller chose, where there was one: the way most often taken, and the last time's reason for it."""
    ways = [run.forecast.way for run in runs if run.forecast]
    if not ways:
        return {"chose": None, "chose_why": None, "predicted_ms": None}
    way = statistics.mode(ways)
    last = [run.forecast for run in runs if run.forecast and run.forecast.way == way][-1]
    return {"chose": way, "chose_why": last.why, "predicted_ms": last.total_ms}
