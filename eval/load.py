"""``ragkv eval load``: how many requests a second find their first token in time, for every method.

Requests come by themselves, at random times (Poisson), each with another prompt; prompts are prefilled one after the
other, as the engine does, first come first served. What a prefill takes is measured; the highest rate at which the
asked-for share of requests finds its first token in time follows from many simulated arrivals with those times; then
requests really come at that rate, for some seconds, and a row holds what they found beside what was simulated.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ragkv.clock import Stopwatch
from ragkv.config import Settings
from ragkv.errors import ConfigError
from ragkv.eval.arrivals import Seconds, highest_rate, serve_at, typical_arrivals
from ragkv.eval.ttft import TIERS, Save, about, usable_model
from ragkv.eval.ttft_bench import Bench, Request, opened
from ragkv.eval.ttft_rows import FULL_CELL, Asked, Row
from ragkv.eval.ttft_stores import Place, Say
from ragkv.prefill import FULL
from ragkv.store import CODECS
from ragkv.types import Method

_LEAST_REQUESTS = 12
_TRIES, _SLOWER = 3, 0.95


@dataclass(frozen=True)
class LoadPlan:
    """What to measure. ``prompts`` different ones, each of ``context`` tokens, are drawn from ``pool`` chunks.

    Args:
        limit: most time to first token, in full prefills of an idle machine.
        percentile: of the requests that have to keep it.
        confirm_s: how long requests really come.

    Raises:
        ConfigError: a value that cannot be measured.
    """

    context: int = 8192
    tier: str = "ram"
    codec: str = "raw"
    asked: tuple[Asked, ...] = (FULL_CELL,)
    chunk_tokens: int = 512
    question_tokens: int = 32
    pool: int = 32
    prompts: int = 12
    limit: float = 2.0
    percentile: float = 90.0
    confirm_s: float = 15.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tier not in TIERS or self.tier == "remote":
            raise ConfigError(f"--tier: {self.tier!r} is not one of device, ram, ssd", tier=self.tier)
        if self.codec not in CODECS:
            raise ConfigError(f"--codec: {self.codec!r} is not one of {', '.join(CODECS)}", codec=self.codec)
        if self.chunks < 1 or self.chunks > self.pool:
            raise ConfigError(
                f"--pool: {self.pool} chunks of {self.chunk_tokens} tokens are too few for a context of {self.context}",
                pool=self.pool,
            )
        if min(self.question_tokens, self.prompts) < 1 or self.limit <= 1 or not 0 < self.percentile < 100:
            raise ConfigError("--prompts must be at least 1, --limit more than 1, --percentile between 0 and 100")

    @property
    def chunks(self) -> int:
        return self.context // self.chunk_tokens


def measure_load(settings: Settings, plan: LoadPlan, *, say: Say, save: Save = lambda result: None) -> dict[str, Any]:
    """``rows``, one for each method, full prefill first; docs/blending.md says what the columns mean.

    ``save`` is called with what there is after every method.

    Raises:
        ConfigError, ModelError, PromptTooLongError, StoreError: as :func:`ragkv.eval.ttft.measure_ttft`.
    """
    checkpoint = usable_model(settings, plan.context + plan.question_tokens)
    place = Place(plan.tier, plan.codec)
    result: dict[str, Any] = {"rows": [], **about(checkpoint.runner)}
    with (
        torch.inference_mode(),
        opened(
            checkpoint,
            [place],
            [plan.pool * plan.chunk_tokens],
            chunk_tokens=plan.chunk_tokens,
            question_tokens=plan.question_tokens,
            folder=settings.data_dir.expanduser(),
            remote=None,
            remote_timeout_ms=settings.remote_timeout_ms,
            say=say,
        ) as bench,
    ):
        requests = _requests(bench, plan)
        for request in requests:
            bench.settle(place, [request])
        full, by = _fastest_full(bench, place, requests, say)
        limit = plan.limit * statistics.median(full.seconds)
        others = [_Method(m, r, _serving(bench, place, m, r)) for m, r in plan.asked if m != FULL]
        for method in [full, *others]:
            row = _row(bench, plan, method if method is full else _measured(method, requests, say), requests, limit)
            most = (result["rows"][0] if result["rows"] else row)["requests_per_s"]
            # A disturbed machine may keep the limit at no rate.
            row["relative_to_full"] = row["requests_per_s"] / most if most else None
            where = {"model": settings.model, "tier": plan.tier, "codec": plan.codec, "context_tokens": plan.context}
            result["rows"].append({**where, **row, "full_prefill_by": by, "device": result["device"]})
            save(result)
    return result


@dataclass
class _Method:
    """A way to serve a request, which says what a controller chose; ``seconds`` it takes by itself, for every prompt
    twice, and those choices."""

    name: Method
    ratio: float
    serve: Callable[[Request], str | None]
    seconds: list[float] = field(default_factory=list)
    chose: list[str] = field(default_factory=list)


def _requests(bench: Bench, plan: LoadPlan) -> list[Request]:
    """Different chunks of the pool in different orders, each with a question of its own."""
    pool, draw = bench.pool(plan.pool, plan.codec), random.Random(plan.seed)
    return [bench.request(draw.sample(pool, plan.chunks), number) for number in range(plan.prompts)]


def _serving(bench: Bench, place: Place, method: Method, ratio: float) -> Callable[[Request], str | None]:
    def serve(request: Request) -> str | None:
        *_, forecast = bench.first_token(place, request, method, ratio, Stopwatch())
        return forecast.way if forecast else None

    return serve


def _by_library(bench: Bench) -> Callable[[Request], str | None]:
    def serve(request: Request) -> None:
        bench.library_token(request)

    return serve


def _fastest_full(bench: Bench, place: Place, requests: Sequence[Request], say: Say) -> tuple[_Method, str]:
    """ragkv's full prefill or the library's, whichever is faster."""
    ways = {"ragkv": _serving(bench, place, *FULL_CELL), "library": _by_library(bench)}
    measured = {by: _measured(_Method(*FULL_CELL, serve), requests, say) for by, serve in ways.items()}
    by = min(measured, key=lambda name: statistics.median(measured[name].seconds))
    return measured[by], by


def _measured(method: _Method, requests: Sequence[Request], say: Say) -> _Method:
    """Serve every prompt twice, by itself; once before that, when kernels are chosen, does not count."""
    bench = [*requests, *requests, *requests]
    for done, request in enumerate(bench, 1):
        started = time.perf_counter()
        chose = method.serve(request)
        if done > len(requests):
            method.seconds.append(time.perf_counter() - started)
            method.chose += [chose] if chose else []
        say(f"{method.name} {method.ratio:.2f}", done, len(bench))
    return method


def _row(bench: Bench, plan: LoadPlan, method: _Method, requests: Sequence[Request], limit: float) -> Row:
    highest = highest_rate(method.seconds, limit, plan.percentile, plan.seed)
    row: Row = {
        "method": method.name,
        "ratio": method.ratio,
        "requests_per_s": 0.0,
        "ttft_limit_ms": 1000 * limit,
        "percentile": plan.percentile,
        "confirmed": False,
        "service_ms": 1000 * statistics.median(method.seconds),
        "simulated_requests_per_s": highest,
        "chose": statistics.mode(method.chose) if method.chose else None,
    }
    for slower in range(_TRIES if highest else 0):
        rate = highest * _SLOWER**slower
        really, simulated = _really(bench, plan, method, requests, limit, rate)
        row |= {
            "requests_per_s": rate,
            "confirmed": bool(np.percentile(really, plan.percentile) <= limit),
            "utilisation": rate * statistics.mean(method.seconds),
            "requests": len(really),
            "in_time": float((really <= limit).mean()),
            **_percentiles(really, plan.percentile),
            "simulated": _percentiles(simulated, plan.percentile),
        }
        if row["confirmed"]:
            break
    return row


def _really(
    bench: Bench, plan: LoadPlan, method: _Method, requests: Sequence[Request], limit: float, rate: float
) -> tuple[Seconds, Seconds]:
    """Seconds to first token of requests that really come, and of the same arrivals simulated."""
    count = max(_LEAST_REQUESTS, round(plan.confirm_s * rate))
    arrivals, simulated = typical_arrivals(rate, count, method.seconds, limit, plan.percentile, plan.seed)
    bench.runner.synchronize()
    return serve_at(arrivals, [requests[i % len(requests)] for i in range(count)], method.serve), simulated


def _percentiles(seconds: Seconds, asked: float) -> dict[str, float]:
    return {f"p{p:g}_ttft_ms": 1000 * float(np.percentile(seconds, p)) for p in sorted({50.0, 90.0, 99.0, asked})}
