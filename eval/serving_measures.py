"""What a run of a serving engine comes to: a row of percentiles, rates and shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.eval.serving_drive import Drive, Life
from ragkv.eval.serving_fairness import jain_index, largest_gap, services

Row = dict[str, Any]
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
# Of the curves that are drawn: dense where the tails are.
QUANTILES = (0.0, 1.0, 5.0, *range(10, 90, 5), *range(90, 99), 99.0, 99.3, 99.5, 99.7, 99.8, 99.9, 99.95, 100.0)
Floats = NDArray[np.float64]


def row_of(drive: Drive, *, slo_ttft_ms: float, slo_tbt_ms: float) -> Row:
    """Times in ms. A request without a first token when the run ended counts with the time it had waited by then, so
    that who serves less does not look better for it; the same goes for the token that a stopped one waited for."""
    came = [life for life in drive.lives if life.fate not in ("refused", "failed")]
    first, gaps = ttfts(came, drive.ended), tbts(came, drive.ended)
    return {
        **percentiles("ttft", first),
        **percentiles("tbt", gaps),
        **_rates(drive, came, slo_ttft_ms, slo_tbt_ms),
        **_fairness(drive),
        **_counters(drive),
        **_fates(drive),
        "tenants": _tenants(drive, came),
        "curves": {"ttft_ms": curve(first), "tbt_ms": curve(gaps)},
    }


def ttfts(lives: Sequence[Life], ended: float) -> Floats:
    return np.array([1000 * ((life.times[0] if life.times else ended) - life.due) for life in lives])


def tbts(lives: Sequence[Life], ended: float) -> Floats:
    """Gaps between the tokens of one request after the first, of all requests."""
    gaps = [np.diff(_until(life, ended)) for life in lives if life.times]
    return 1000 * np.concatenate(gaps) if gaps else np.zeros(0)


def _until(life: Life, ended: float) -> list[float]:
    """Its tokens' times, and the end of the run for one that still waited for the next."""
    times = [at for at in life.times if at <= ended] or life.times[:1]
    return [*times, ended] if life.fate == "unfinished" and times[-1] < ended else times


def percentiles(name: str, values: Floats) -> Row:
    """None without values."""
    return {f"{p}_{name}_ms": float(np.percentile(values, q)) if len(values) else None for p, q in PERCENTILES.items()}


def curve(values: Floats) -> list[float]:
    return [round(float(v), 3) for v in np.percentile(values, QUANTILES)] if len(values) else []


def _rates(drive: Drive, came: Sequence[Life], slo_ttft_ms: float, slo_tbt_ms: float) -> Row:
    done = [life for life in came if life.fate == "done"]
    kept = [life for life in done if _keeps(life, slo_ttft_ms, slo_tbt_ms)]
    tokens = sum(at <= drive.ended for life in came for at in life.times)
    return {
        "throughput_tok_s": tokens / drive.seconds,
        "requests_s": len(done) / drive.seconds,
        "goodput": len(kept) / drive.seconds,
        "slo_ttft_ms": slo_ttft_ms,
        "slo_tbt_ms": slo_tbt_ms,
    }


def _keeps(life: Life, slo_ttft_ms: float, slo_tbt_ms: float) -> bool:
    """Both limits: its first token's, and that of the mean time between its tokens (DistServe, OSDI 2024)."""
    between = (life.times[-1] - life.times[0]) / max(len(life.times) - 1, 1)
    return life.times[0] - life.due <= slo_ttft_ms / 1000 and between <= slo_tbt_ms / 1000


def _fairness(drive: Drive) -> Row:
    by_tenant = services(drive)
    return {"jain": jain_index(by_tenant, drive.seconds), "service_gap": largest_gap(by_tenant)}


def _counters(drive: Drive) -> Row:
    counts = drive.counters
    steps, busy = max(counts["steps"], 1), counts["step_seconds"]
    prompts = sum(life.prompt_tokens for life in drive.lives if life.times)
    return {
        "preemptions": counts["preemptions"],
        "preemption_rate": counts["preemptions"] / max(len(drive.lives), 1),
        "preemptions_per_step": counts["preemptions"] / steps,
        "swap_bytes": counts["swap_in_bytes"] + counts["swap_out_bytes"],
        "swap_in_bytes": counts["swap_in_bytes"],
        "swap_out_bytes": counts["swap_out_bytes"],
        "prefix_hit_share": counts["prefix_hit_tokens"] / max(prompts, 1),
        "steps": counts["steps"],
        "step_ms": 1000 * busy / steps,
        "scheduler_ms": 1000 * counts["scheduler_seconds"] / steps,
        "scheduler_share": counts["scheduler_seconds"] / busy if busy else 0.0,
        "idle_share": min(1.0, counts["idle_seconds"] / drive.seconds),
    }


def _fates(drive: Drive) -> Row:
    fates = [life.fate for life in drive.lives]
    counts = {fate: fates.count(fate) for fate in ("done", "unfinished", "refused", "failed")}
    why = sorted({life.why for life in drive.lives if life.fate == "failed"})
    return {"requests": len(fates), "seconds": drive.seconds, **counts, "failures": why[:3]}


def _tenants(drive: Drive, came: Sequence[Life]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for tenant, service in services(drive).items():
        own = [life for life in came if life.ask.tenant == tenant]
        rows[tenant] = {
            **percentiles("ttft", ttfts(own, drive.ended)),
            **percentiles("tbt", tbts(own, drive.ended)),
            "requests": len(own),
            "service": own[0].ask.weight * float(service.totals[-1]) if len(service.totals) else 0.0,
        }
    return rows
