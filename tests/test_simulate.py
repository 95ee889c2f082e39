"""The scheduler in simulation: fairness in every overload, and that the model loses nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import cycle, product

import numpy as np
import pytest

from ragkv.errors import ConfigError, InputError
from ragkv.eval.simulate import EngineModel, simulate
from ragkv.eval.simulated import SimRequest, SimResult
from ragkv.eval.step_costs import StepCosts
from ragkv.scheduling import service_bound
from ragkv.scheduling.scheduler import CREDIT, QUANTUM
from ragkv.tally import StepRecord

SETTINGS = {
    "policy": "vtc",
    "max_running": 8,
    "max_queued": 10**6,
    "max_queued_tokens": 10**9,
    "max_preemptions": 8,
    "aging_s": 10.0,
    "quantum": 64,
    "credit": 512,
}
LONGEST, MOST = 192, 24  # tokens of prompts and of outputs
STARTING = 2
# Memory for five of the largest: it preempts now and then.
ENGINE = EngineModel(blocks=64, prefill_tokens=128, starting=STARTING, sample_steps=4)
BOUND = service_bound(running=8, prefills=STARTING, prompt_tokens=LONGEST, output_tokens=MOST, credit=512)
SECONDS = 8.0


def arrivals(rng: random.Random, tenant: str, rate: float, size: float = 1.0, **changes) -> list[SimRequest]:
    """Poisson, for ``SECONDS``; on and off for a second each if ``rate`` is negative."""
    made, at = [], 0.0
    while (at := at + rng.expovariate(abs(rate))) < SECONDS:
        if rate > 0 or int(at) % 2 == 0:
            prompt, output = rng.randint(8, int(LONGEST * size)), rng.randint(2, int(MOST * size))
            made.append(SimRequest(at, prompt, output, tenant, **changes))
    return made


MIXES = {
    "overload": lambda rng: arrivals(rng, "a", 120) + arrivals(rng, "b", 120),
    "flood": lambda rng: arrivals(rng, "a", 350) + arrivals(rng, "b", 90),
    "on-off": lambda rng: arrivals(rng, "a", 120) + arrivals(rng, "b", -220),
    "weights": lambda rng: arrivals(rng, "a", 150) + arrivals(rng, "b", 150, weight=2.0),
    "short and long": lambda rng: arrivals(rng, "short", 500, size=0.2) + arrivals(rng, "long", 120),
}


def served(mix: str, seed: int, policy: str = "vtc") -> SimResult:
    requests = MIXES[mix](random.Random(seed))
    return simulate(requests, {**SETTINGS, "policy": policy}, StepCosts(), ENGINE)


def check(result: SimResult) -> None:
    """Every request got its tokens, each later than the one before."""
    assert all(a < b for a, b in zip(result.step_ends, result.step_ends[1:], strict=False))
    for outcome in result.outcomes:
        times = result.token_times(outcome)
        assert len(times) == outcome.request.output_tokens
        assert times[0] > outcome.request.at
        assert outcome.preemptions <= SETTINGS["max_preemptions"]


@pytest.mark.parametrize("mix", MIXES)
def test_equal_tenants_get_equal_service_in_every_overload(mix):
    result = served(mix, 0)
    check(result)
    assert result.jain() > 0.99
    assert 0 < result.largest_gap() <= BOUND
    assert result.preemptions > 0


def test_first_come_first_served_is_not_fair_to_who_asks_for_less():
    result = served("flood", 0, "fcfs")
    assert result.jain() < 0.9
    assert result.largest_gap() > BOUND


def widest_gap(pairs: Iterable[tuple[int, str]]) -> float:
    """The largest over these seeds and mixes, of 100,000 requests or more."""
    results = [served(mix, seed) for seed, mix in pairs]
    assert sum(len(result.outcomes) for result in results) >= 100_000
    assert min(result.jain() for result in results) > 0.99
    return max(result.largest_gap() for result in results)


def test_the_bound_holds_over_fifty_seeds_and_a_hundred_thousand_requests():
    assert widest_gap(zip(range(50), cycle(MIXES), strict=False)) <= BOUND


@pytest.mark.slow
def test_the_bound_holds_in_every_mix_with_every_seed():
    assert widest_gap(product(range(50), MIXES)) <= BOUND


# Longest prompts and outputs, and the rate at which a tenant uses half of an H200 with an 8B model, the default costs.
FULL_SIZE = {"short": (512, 128, 40.0), "mixed": (2048, 256, 10.0), "long": (8192, 256, 2.5)}


def poisson(tenant: str, kind: str, times_half: float, seed: int) -> list[SimRequest]:
    rng, (prompt, output, half), made, at = random.Random(seed), FULL_SIZE[kind], [], 0.0
    while (at := at + rng.expovariate(times_half * half)) < 40:
        sizes = rng.randint(prompt // 16, prompt), rng.randint(output // 16, output)
        made.append(SimRequest(at, *sizes, tenant))
    return made


@pytest.mark.parametrize(
    ("light", "share", "other"),
    [("short", 0.1, "short"), ("short", 0.1, "long"), ("mixed", 0.6, "mixed"), ("long", 0.4, "long")],
)
def test_who_floods_does_not_slow_down_another(light, share, other):
    """P50 and P99 of TTFT of a tenant beside one that floods, over those beside one that uses its half."""
    settings = {**SETTINGS, "max_running": 64, "quantum": QUANTUM, "credit": CREDIT}
    tails = []
    for times_half in (1, 6):
        requests = poisson("light", light, share, 0) + poisson("other", other, times_half, 1)
        result = simulate(requests, settings, StepCosts(), EngineModel(2500))
        tails.append(np.percentile(result.ttft(["light"]), [50, 99]))
    assert (tails[1] <= 1.5 * tails[0]).all()


@pytest.mark.parametrize("preemption", ["recompute", "blockwise", "groups", "async", "reuse"])
def test_every_way_to_preempt_serves_everything(preemption):
    rng = random.Random(0)
    requests = [request for mix in ("weights", "flood") for request in MIXES[mix](rng)[::8]]
    first = len(requests)
    turns = [
        SimRequest(rng.random(), 40 * (turn + 1), 10, "talks", after=number - 10 if turn else None, priority=number % 3)
        for number, turn in zip(range(first, first + 40), sorted([*range(4)] * 10), strict=True)
    ]
    engine = EngineModel(blocks=40, prefill_tokens=64, preemption=preemption, sample_steps=4)
    result = simulate(requests + turns, {**SETTINGS, "policy": "priority"}, StepCosts(), engine)
    check(result)
    assert (result.copied_blocks == 0) == (result.loaded_blocks == 0) == (preemption == "recompute")
    assert result.found_tokens > 0
    assert result.busy_s <= result.ended + 1e-9
    assert result.preemptions > 0


def test_what_a_preemption_frees_at_once_is_given_away_next():
    """The only one that runs gives way to a better one, and nothing else is to come."""
    requests = [SimRequest(0.0, 100, 60, priority=1), SimRequest(0.01, 150, 4, priority=0)]
    engine = EngineModel(blocks=12, preemption="recompute")
    result = simulate(requests, {**SETTINGS, "policy": "priority"}, StepCosts(), engine)
    check(result)
    assert result.preemptions == 1


def test_alone_a_request_takes_what_its_steps_cost():
    costs = StepCosts(fixed_s=1.0, row_s=0.1, kv_token_s=0.001, prefill_token_s=0.01)
    engine = EngineModel(blocks=100, prefill_tokens=64)
    result = simulate([SimRequest(5.0, 100, 40, cached_tokens=20)], SETTINGS, costs, engine)
    first = 1 + 0.64 + 1 + 0.16  # 80 tokens in two steps
    # The turn of the first token gives the second one, too.
    times = [first, *(first - 1 + sum(1.1 + 0.001 * (101 + n) for n in range(made)) for made in range(1, 40))]
    np.testing.assert_allclose(result.token_times(result.outcomes[0]), 5 + np.array(times))


def test_a_later_turn_comes_when_the_one_before_is_over_and_finds_what_that_left():
    turns = [SimRequest(0.0, 400, 4), SimRequest(1.0, 404, 4, after=0), SimRequest(9.0, 400, 4)]
    result = simulate(turns, SETTINGS, StepCosts(), EngineModel(blocks=100, prefill_tokens=512))
    first, second, other = result.ttft()
    assert result.outcomes[1].came == pytest.approx(1.0 + result.token_times(result.outcomes[0])[-1])
    assert result.found_tokens == 400  # whole blocks
    assert second < 0.6 * first
    assert other == pytest.approx(first)


def test_who_finds_the_queue_full_is_refused():
    requests = [SimRequest(0.0, 10, 10) for _ in range(20)]
    result = simulate(requests, {**SETTINGS, "max_queued": 12}, StepCosts(), ENGINE)
    assert sum(outcome.refused for outcome in result.outcomes) == 8
    assert len(result.ttft()) == 12


def test_nothing_to_do_takes_no_time():
    result = simulate([], SETTINGS, StepCosts(), ENGINE)
    assert (result.throughput, result.largest_gap(), result.jain(), len(result.ttft())) == (0.0, 0.0, None, 0)


def test_a_request_that_never_fits_is_an_error():
    with pytest.raises(ConfigError, match="does not fit"):
        simulate([SimRequest(0.0, 10_000, 10)], SETTINGS, StepCosts(), ENGINE)


def test_costs_are_found_again_from_steps():
    costs, rng = StepCosts(prefill_token_s=0.0), random.Random(0)
    draws = [(rng.randint(1, 64), rng.randint(1, 60_000), rng.choice([0, 512])) for _ in range(200)]
    records = [StepRecord(*draw, costs.step(*draw) * rng.uniform(0.99, 1.01)) for draw in draws]
    fitted = StepCosts.fit(records, bytes_per_s=1e9)
    assert fitted.bytes_per_s == 1e9
    assert fitted.prefill_token_s >= 0
    for draw in draws:
        assert fitted.step(*draw) == pytest.approx(costs.step(*draw), rel=0.02)


def test_without_prefills_these_cost_nothing_and_three_steps_are_too_few():
    records = [StepRecord(rows, 100 * rows, 0, 0.004 + 0.001 * rows) for rows in range(1, 9)]
    assert StepCosts.fit(records).prefill_token_s == 0.0
    with pytest.raises(InputError, match="4 or more"):
        StepCosts.fit(records[:3])
