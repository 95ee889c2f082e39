"""Who comes first: aging and its bound, and what tenants owe each other under vtc."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from ragkv.scheduling import State, service_bound
from tests.scheduler_kit import Engine, make_scheduler, make_ticket

AGING = 25.0
CLASSES = 4
CREDIT = 40


def overtakers(policy: str, seed: int) -> int:
    """Steps of one request of the worst class under an endless overload of the best; all that started before it."""
    rng = random.Random(seed)
    engine = Engine(make_scheduler(policy, clock=lambda: len(engine.plans), aging_s=AGING), 40)
    last = engine.submit(make_ticket("last", priority=CLASSES - 1))
    arrived = last.arrived
    while last.state is not State.DONE:
        for _ in range(2):
            engine.submit(make_ticket("good", rng.randint(4, 20), rng.randint(4, 20), priority=0))
        plan = engine.step()
        for ticket in plan.start:
            if last.state is State.WAITING:
                assert ticket.arrived < arrived + (CLASSES - 1) * AGING
        if len(engine.plans) > 5000:
            raise AssertionError("it starved")
    return len(engine.plans)


@pytest.mark.parametrize("seed", range(5))
def test_only_who_arrives_within_the_bound_passes_a_worse_class(seed):
    engine_steps = overtakers("priority", seed)
    assert engine_steps > CLASSES * AGING  # it did wait: the overload was one


def test_priorities_decide_and_may_change_at_any_time():
    scheduler = make_scheduler("priority", max_running=1)
    early, late = make_ticket("early", priority=1), make_ticket("late", priority=0)
    for ticket in (early, late):
        scheduler.submit(ticket)
    scheduler.set_priority(early, -1)
    assert scheduler.plan(100, 0).start == [early]
    early.blocks, early.wants = 3, 0
    scheduler.set_priority(early, 5)
    plan = scheduler.plan(97, 0)
    assert (plan.preempt, plan.start) == ([early], [late])


def test_vtc_does_not_look_at_priority_between_tenants():
    scheduler = make_scheduler("vtc", max_running=1)
    served, new = make_ticket(tenant="served", priority=-9), make_ticket(tenant="new", priority=9)
    scheduler.submit(make_ticket(tenant="served"))
    [first] = scheduler.plan(100, 0).start
    scheduler.charge(first, 8, 1)
    for ticket in (served, new):
        scheduler.submit(ticket)
    assert served.state is new.state is State.WAITING
    scheduler._ranking.accounts["new"].counter = 0.0
    scheduler.finish(first)
    assert scheduler.plan(100, 0).start == [new]


def test_who_was_away_saves_nothing_up():
    engine = Engine(make_scheduler("vtc", credit=50), 40)
    for _ in range(40):
        engine.submit(make_ticket(tenant="busy"))
    for _ in range(40):
        engine.step()
    engine.submit(make_ticket(tenant="late"))
    accounts = engine.scheduler._ranking.accounts
    assert accounts["busy"].counter > 100
    assert accounts["late"].counter == accounts["busy"].counter - 50


def test_cache_hits_are_free_and_weights_divide():
    scheduler = make_scheduler("vtc")
    ticket = make_ticket(prompt=100, tenant="t", weight=4.0)
    scheduler.submit(ticket)
    scheduler.plan(1000, 0)
    account = scheduler._ranking.accounts["t"]
    assert account.level == 100 / 4  # what it promises
    scheduler.charge(ticket, 10, 0)
    assert (account.service, account.level) == (10, 100 / 4)
    scheduler.charge(ticket, 0, 1)  # the other 90 were in a cache
    assert (account.service, account.level) == (12, 12 / 4)
    scheduler.charge_many([ticket], 3)
    assert scheduler.stats.service == {"t": 18}


def test_starts_of_one_plan_are_spread_over_tenants():
    scheduler = make_scheduler("vtc", max_running=4)
    for tenant in "aaaabbbb":
        scheduler.submit(make_ticket(tenant=tenant))
    assert [ticket.tenant for ticket in scheduler.plan(1000, 0).start] == ["a", "b", "a", "b"]


def test_a_tenant_ahead_by_more_than_the_quantum_loses_a_running_request():
    scheduler = make_scheduler("vtc", max_running=1, quantum=50, credit=0)
    ahead, behind = make_ticket(tenant="ahead"), make_ticket(tenant="behind")
    scheduler.submit(ahead)
    scheduler.plan(100, 0)
    ahead.blocks, ahead.wants = 3, 0
    scheduler.submit(behind)
    level = scheduler._ranking.accounts["behind"].level
    scheduler.charge(ahead, int(level) + 50 - 2, 1)
    assert scheduler.plan(97, 0).preempt == []
    scheduler.charge(ahead, 0, 1)
    assert scheduler.plan(97, 0).preempt == [ahead]


def test_a_prefill_under_way_gives_way_to_a_tenant_behind_by_more_than_the_quantum_alone():
    scheduler = make_scheduler("vtc", quantum=50)
    ahead, behind = make_ticket(tenant="ahead"), make_ticket(tenant="behind")
    for ticket in (ahead, behind):
        scheduler.submit(ticket)
    scheduler.plan(100, 0)
    assert scheduler.in_turn([]) == []
    scheduler.charge(ahead, 8 + 50, 0)
    assert scheduler.in_turn([ahead, behind]) == [ahead, behind]
    assert scheduler.in_turn([behind, ahead]) == [behind, ahead]
    scheduler.charge(ahead, 1, 0)
    assert scheduler.in_turn([ahead, behind]) == [behind, ahead]


def gap(policy: str, seed: int, requests: int) -> tuple[float, float]:
    """Largest difference between counters (service ÷ weight) of backlogged tenants in an overload; half the bound.

    Requests of some tenants are long and of others short; weights differ; some are away at times.
    """
    rng = random.Random(seed)
    longest, running, prefills = 24, 6, rng.choice([1, 2, 6])
    scheduler = make_scheduler(
        policy, max_running=running, max_queued=10**6, quantum=rng.choice([0, 30, 1e9]), credit=CREDIT
    )
    engine = Engine(scheduler, rng.choice([30, 60, 200]), starting=prefills)
    weights = {"short": 1.0, "long": 1.0, "heavy": 3.0, "sometimes": 1.0}
    scale = {"short": 6, "long": longest, "heavy": longest, "sometimes": 12}
    widest, number = 0.0, 0
    while number < requests:
        for tenant, weight in weights.items():
            waits = sum(ticket.tenant == tenant and ticket.state is State.WAITING for ticket in engine.made)
            away = tenant == "sometimes" and len(engine.plans) // 100 % 2
            for _ in range(0 if away or waits > 3 else rng.randint(1, 6 if tenant == "long" else 2)):
                most = scale[tenant]
                sizes = rng.randint(1, most), rng.randint(1, most)
                engine.submit(make_ticket(str(number), *sizes, tenant=tenant, weight=weight))
                number += 1
        engine.step()
        waiting = {ticket.tenant for ticket in engine.made if ticket.state in (State.WAITING, State.PREEMPTED)}
        counters = [scheduler._ranking.accounts[tenant].counter for tenant in waiting]
        widest = max([widest, *(abs(a - b) for a, b in combinations(counters, 2))])
    return widest, service_bound(
        running=running, prefills=prefills, prompt_tokens=longest, output_tokens=longest, credit=CREDIT
    ) / 2


@pytest.mark.parametrize("seed", range(10))
def test_counters_of_backlogged_tenants_stay_within_the_bound(seed):
    widest, bound = gap("vtc", seed, 300)
    assert 0 < widest <= bound


def test_without_vtc_the_bound_is_broken():
    widest, bound = gap("fcfs", 0, 1500)
    assert widest > 2 * bound
