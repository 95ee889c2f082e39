"""The scheduler's promises, against an engine that counts blocks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.errors import ConfigError, QueueFullError
from ragkv.scheduling import POLICIES, State
from tests.scheduler_kit import Engine, make_scheduler, make_ticket, random_ticket

policies = pytest.mark.parametrize("policy", POLICIES)


def submitted(scheduler, *tickets):
    for ticket in tickets:
        scheduler.submit(ticket)
    return tickets


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("scheduler", {"policy": "lottery"}),
        ("max_running", {"max_running": 0}),
        ("max_preemptions", {"max_preemptions": -1}),
        ("quantum", {"quantum": -1}),
        ("aging_s", {"aging_s": 0}),
    ],
)
def test_a_bad_setting_is_named(setting, changes):
    with pytest.raises(ConfigError) as caught:
        make_scheduler(**changes)
    assert caught.value.context["setting"] == setting
    assert setting in caught.value.message


def test_a_weight_must_be_positive():
    with pytest.raises(ConfigError, match="weight"):
        make_scheduler().submit(make_ticket(weight=0))


def test_the_queue_is_bounded_by_count_and_by_tokens():
    scheduler = make_scheduler(max_queued=2, max_queued_tokens=100)
    submitted(scheduler, make_ticket(prompt=200))  # alone, any request is accepted
    refused = make_ticket(prompt=1)
    with pytest.raises(QueueFullError, match="max_queued_tokens"):
        scheduler.submit(refused)
    scheduler.cancel(refused)
    assert (scheduler.stats.waiting, scheduler.stats.waiting_tokens) == (1, 200)
    scheduler.plan(100, 0)
    submitted(scheduler, make_ticket(prompt=50), make_ticket(prompt=50))
    with pytest.raises(QueueFullError) as caught:
        scheduler.submit(refused)
    assert caught.value.context == {"setting": "max_queued", "value": 2}


@policies
def test_nobody_passes_a_large_request_at_the_head(policy):
    scheduler = make_scheduler(policy)
    large, small = submitted(scheduler, make_ticket(wants=10, most=10), make_ticket(wants=1, most=2))
    assert scheduler.plan(9, 0).start == []
    assert scheduler.plan(11, 0).start == [large, small]


def test_blocks_on_their_way_back_count_before_anybody_else_is_preempted():
    scheduler = make_scheduler("priority")
    [worst, bad] = submitted(scheduler, make_ticket(priority=9), make_ticket(priority=8))
    scheduler.plan(100, 0)
    for ticket in (worst, bad):
        ticket.blocks, ticket.wants = 5, 0
    [good] = submitted(scheduler, make_ticket(priority=0, wants=5))
    assert scheduler.plan(0, 0).preempt == [worst]
    worst.blocks, worst.wants = 0, 5
    plan = scheduler.plan(0, 5)
    assert plan.preempt == plan.start == []
    assert scheduler.plan(5, 0).start == [good]
    assert worst.state is State.PREEMPTED


def test_growth_takes_the_worst_and_counts_what_is_being_freed():
    scheduler = make_scheduler()
    first, second, third = submitted(scheduler, *(make_ticket(str(number)) for number in range(3)))
    scheduler.plan(100, 0)
    for ticket in (first, second, third):
        ticket.blocks, ticket.wants = 3, 1
    assert scheduler.plan(1, 2).preempt == []
    assert scheduler.plan(1, 0).preempt == [third]
    assert scheduler.stats.preempted == 1


def test_a_slot_changes_hands_at_once():
    scheduler = make_scheduler("priority", max_running=1)
    [worse] = submitted(scheduler, make_ticket(priority=1))
    scheduler.plan(100, 0)
    worse.blocks, worse.wants = 3, 0
    [better] = submitted(scheduler, make_ticket(priority=0))
    plan = scheduler.plan(97, 0)
    assert (plan.preempt, plan.start) == ([worse], [better])


def test_nobody_is_preempted_in_vain():
    """Neither where it would not make the better one fit, nor where worse ones suffice without it."""
    scheduler = make_scheduler("priority", max_running=9)
    small, large = submitted(scheduler, make_ticket(priority=9), make_ticket(priority=8))
    scheduler.plan(100, 0)
    small.blocks, small.wants, large.blocks, large.wants = 1, 0, 20, 0
    [better] = submitted(scheduler, make_ticket(priority=0, wants=22, most=22))
    assert scheduler.plan(0, 0).preempt == []
    better.wants = 20
    assert scheduler.plan(0, 0).preempt == [large]


def test_equals_do_not_displace_each_other():
    scheduler = make_scheduler("priority", max_running=1)
    running, waiting = submitted(scheduler, make_ticket(), make_ticket())
    assert scheduler.plan(100, 0).start == [running]
    running.blocks, running.wants = 3, 0
    for _ in range(100):
        plan = scheduler.plan(97, 0)
        assert plan.preempt == plan.start == []
    assert waiting.state is State.WAITING


def test_prefills_at_once_are_limited_and_the_last_place_is_for_the_better():
    scheduler = make_scheduler("priority", max_running=9)
    first, second, third = submitted(scheduler, *(make_ticket(str(number), priority=5) for number in range(3)))
    assert scheduler.plan(100, 0, starting=3).start == [first, second]
    first.wants = second.wants = 0
    scheduler.charge(first, 8, 0)
    assert scheduler.plan(100, 0, starting=3).start == []
    [better, best] = submitted(scheduler, make_ticket(priority=4), make_ticket(priority=3))
    assert scheduler.plan(100, 0, starting=3).start == [best]
    best.wants = 0
    assert scheduler.in_turn([first, second, best]) == [best, first, second]
    scheduler.charge(best, 8, 1)
    assert scheduler.plan(100, 0, starting=3).start == [better]
    for ticket in (first, second, better):
        scheduler.charge(ticket, 0, 1)
    assert scheduler.plan(100, 0, starting=3).start == [third]


def test_one_prefill_at_once_has_the_only_place_whoever_comes():
    scheduler = make_scheduler("priority")
    [worse] = submitted(scheduler, make_ticket(priority=5))
    assert scheduler.plan(100, 0, starting=1).start == [worse]
    worse.wants = 0
    [better] = submitted(scheduler, make_ticket(priority=0))
    assert scheduler.plan(100, 0, starting=1).start == []
    assert scheduler.plan(100, 0, starting=2).start == [better]


def test_who_was_preempted_most_often_comes_back_only_with_all_it_may_want():
    scheduler = make_scheduler("priority", max_preemptions=1, max_running=1)
    [once] = submitted(scheduler, make_ticket(priority=5, wants=3, most=9))
    scheduler.plan(20, 0)
    once.blocks, once.wants = 3, 0
    [better] = submitted(scheduler, make_ticket(priority=0))
    assert scheduler.plan(17, 0).preempt == [once]
    once.blocks, once.wants = 0, 3
    scheduler.finish(better)
    assert scheduler.plan(8, 0).start == []
    assert scheduler.plan(9, 0).start == [once]
    once.blocks, once.wants = 3, 0
    submitted(scheduler, make_ticket(priority=0))
    assert scheduler.plan(6, 0).preempt == []


@policies
def test_finishing_is_idempotent_from_every_state(policy):
    scheduler = make_scheduler(policy, max_running=1)
    running, waiting = submitted(scheduler, make_ticket(), make_ticket(tenant="other"))
    scheduler.plan(100, 0)
    running.blocks, running.wants = 3, 1
    preempted = scheduler.plan(0, 0).preempt
    assert preempted == [running]
    never = make_ticket()
    for ticket in (running, waiting, never) * 2:
        scheduler.cancel(ticket)
        scheduler.set_priority(ticket, 3)
        scheduler.finish(ticket)
        assert ticket.state is State.DONE
    stats = scheduler.stats
    assert (stats.waiting, stats.waiting_tokens, stats.running, stats.preempted) == (0, 0, 0, 0)


@policies
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(20, 60),
    cap=st.integers(0, 4),
    starting=st.sampled_from([None, 1, 2]),
)
def test_everything_ends_whatever_happens(policy, seed, blocks, cap, starting):
    """Arrivals, cancels and changes of priority at random; the kit's engine checks memory, slots and the cap."""
    rng = random.Random(seed)
    engine = Engine(make_scheduler(policy, clock=lambda: len(engine.plans), max_preemptions=cap, quantum=20), blocks)
    engine.starting = starting
    for number in range(30):
        engine.submit(random_ticket(rng, number))
        for _ in range(rng.randrange(4)):
            engine.step()
        victim = rng.choice([*engine.made, make_ticket()])
        if rng.random() < 0.2:
            engine.cancel(victim)
        elif rng.random() < 0.3:
            engine.scheduler.set_priority(victim, rng.randrange(3))
    engine.run()
    stats = engine.scheduler.stats
    assert (stats.waiting, stats.waiting_tokens, stats.running, stats.preempted) == (0, 0, 0, 0)
    assert all(account.promised == 0 for account in engine.scheduler._ranking.accounts.values())
    assert not engine.scheduler._ranking._lines


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_preempted_keep_their_place_and_no_two_change_places_twice(policy):
    """Whoever starts is the best of those that wait, and nobody is preempted for a worse one."""
    rng = random.Random(1)
    engine = Engine(make_scheduler(policy, clock=lambda: len(engine.plans), max_preemptions=50), 40)
    preemptions = 0
    for number in range(300):
        engine.submit(random_ticket(rng, number))
        for _ in range(rng.randrange(10)):
            plan = engine.step()
            preemptions += len(plan.preempt)
            waiting = [t.place for t in engine.made if t.state in (State.WAITING, State.PREEMPTED)]
            assert all(started.place < place for started in plan.start for place in waiting)
            assert all(victim.place > started.place for victim in plan.preempt for started in plan.start)
    assert preemptions > 20
