"""One server, requests at random times, first come first served: what they wait, and how many it can take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

SIMULATED = 20_000
_HALVINGS = 30
_DRAWS = 64
T = TypeVar("T")
Seconds = NDArray[np.float64]


def poisson(rate: float, count: int, seed: int) -> Seconds:
    """``count`` arrival times, in seconds from now, of a Poisson process of ``rate`` a second."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def times_in_system(arrivals: Seconds, services: Seconds) -> Seconds:
    """From arrival to the end of service, with one server (Lindley's recursion, as a running minimum)."""
    gaps = np.diff(arrivals)
    steps = np.concatenate([[0.0], (services[:-1] - gaps).cumsum()])
    times: Seconds = services + steps - np.minimum.accumulate(steps)
    return times


def draw_services(measured: Sequence[float], count: int, seed: int) -> Seconds:
    """``count`` service times, drawn from those measured."""
    return np.random.default_rng(seed).choice(np.asarray(measured, np.float64), count)


def highest_rate(measured: Sequence[float], limit: float, percentile: float, seed: int = 0) -> float:
    """Arrivals a second of which ``percentile`` % are served within ``limit`` seconds, waiting included; 0.0 if they
    are not even when nobody waits."""
    services = draw_services(measured, SIMULATED, seed)
    unit = poisson(1.0, SIMULATED, seed + 1)

    def kept(rate: float) -> bool:
        return bool(np.percentile(times_in_system(unit / rate, services), percentile) <= limit)

    low, high = 0.0, 1 / float(np.mean(services))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low if np.percentile(services, percentile) <= limit else 0.0


def typical_arrivals(
    rate: float, count: int, measured: Sequence[float], limit: float, percentile: float, seed: int = 0
) -> tuple[Seconds, Seconds]:
    """Of many draws of ``count`` arrivals the one that comes closest to keeping ``limit`` exactly, as endless arrivals
    at the highest rate do, and its simulated times: short draws differ much, and a try should not depend on luck."""
    draws = []
    for number in range(_DRAWS):
        arrivals = poisson(rate, count, seed + number)
        times = times_in_system(arrivals, draw_services(measured, count, seed + number))
        over = float(np.percentile(times, percentile)) - limit
        draws.append((over > 0, abs(over), number, arrivals, times))
    *_, arrivals, times = min(draws, key=lambda draw: draw[:3])
    return arrivals, times


def serve_at(
    arrivals: Seconds,
    requests: Sequence[T],
    serve: Callable[[T], object],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Seconds:
    """Really serve ``requests`` one after the other, none before it arrives; seconds from each arrival to its end."""
    started, times = clock(), []
    for at, request in zip(arrivals, requests, strict=True):
        early = started + at - clock()
        if early > 0:
            sleep(early)
        serve(request)
        times.append(clock() - started - at)
    return np.array(times)
