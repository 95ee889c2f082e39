"""The cost model: estimates that believe the right news, and overlap that agrees with a simulation layer by layer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ragkv.costs import STALE_AFTER, Curve, Estimate, Machine, Pass, Piece, Work, passes
from tests.controller_kit import World, simulate, work


def test_a_guess_gives_way_to_the_first_measurement():
    estimate = Estimate(1.0, guessed=True)
    estimate.observe(50.0)
    assert estimate.value == pytest.approx(50.0)


def test_good_news_counts_at_once():
    estimate = Estimate(1.0)
    estimate.observe(0.1)
    assert estimate.value < 0.2


def test_bad_news_counts_when_it_comes_twice():
    estimate = Estimate(1.0)
    estimate.observe(10.0)
    assert estimate.value == 1.0
    estimate.observe(10.0)
    assert estimate.value > 5.0


def test_hiccups_apart_from_each_other_count_nothing():
    estimate = Estimate(1.0)
    for _ in range(20):
        estimate.observe(10.0)
        estimate.observe(1.0)
    assert estimate.value == pytest.approx(1.0)


def test_noise_averages_out():
    estimate, chance = Estimate(1.0), random.Random(1)
    for _ in range(200):
        estimate.observe(1.3 * (1 + chance.uniform(-0.1, 0.1)))
    assert estimate.value == pytest.approx(1.3, rel=0.06)


def test_what_is_not_measured_grows_old():
    machine = World().machine()
    for _ in range(STALE_AFTER):
        assert not machine.tier("ram").stale
        machine.tick()
    assert machine.tier("ram").stale
    machine.tier("ram").observe(1e-9)
    assert not machine.tier("ram").stale


def test_a_curve_is_level_below_straight_between_and_in_proportion_above_its_knots():
    curve = Curve([(16, 1.0), (64, 1.0), (256, 4.0)], 0.0)
    assert [curve.seconds(rows, 0) for rows in (1, 16, 40, 160, 512)] == [1.0, 1.0, 1.0, 2.5, 8.0]
    assert Curve([(16, 1.0)], 0.01).seconds(16, 100) == 2.0


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_curve_follows_what_is_measured_near_and_somewhat_far_away(factor):
    curve = Curve([(n, 1e-5 * n) for n in (16, 64, 256, 1024, 4096)], 1e-9)
    before = {rows: curve.seconds(rows, 100 * rows) for rows in (16, 1000)}
    for _ in range(12):
        curve.observe(1000, 1e5, factor * before[1000])
    assert curve.seconds(1000, 1e5) == pytest.approx(factor * before[1000], rel=0.05)
    moved = curve.seconds(16, 1600) / before[16]
    assert min(1, factor) < moved < max(1, factor)


def machine(layers: int, *, row: float, place: float, read: float, overlapped: bool, window: int) -> Machine:
    curve = Curve([(1, row), (2, 2 * row)], 0.0)
    tiers = {"ram": Estimate(place), "ssd": Estimate(read)}
    return Machine(layers, curve, curve, 0.0, tiers, overlapped, window)


@pytest.mark.parametrize("strategy", ["none", "epic", "question", "hkvd"])
@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("read", [0.0, 1e-10, 1e-9, 1e-8, 1e-7])
@pytest.mark.parametrize("row", [1e-7, 1e-6, 1e-5])
def test_the_prediction_agrees_with_a_simulation(strategy, overlapped, read, row):
    """Computing, reading and placing of 24 layers side by side, whichever of them holds the others up."""
    place, layers, depth = 2e-10, 24, 2
    costs = machine(layers, row=row, place=place, read=read, overlapped=overlapped, window=depth)
    job = work(4, 100, strategy=strategy, token_bytes=24_000)
    loaded = job.pieces[1:]
    nbytes = sum(piece.nbytes for piece in loaded)
    steps = passes(job, loaded, layers)
    expected, _ = simulate(
        steps,
        [row * step.rows for step in steps],
        layers=layers,
        read=nbytes * max(read, place * overlapped) / layers,
        place=0.0 if overlapped else nbytes * place / layers,
        depth=depth,
    )
    times = costs.blend(job, loaded)
    slack = nbytes * max(read, place) / layers * depth  # whole layers there, fractions here
    assert times.total == pytest.approx(expected, rel=0.03, abs=slack)
    assert times.total == pytest.approx(times.load + times.select + times.recompute)
    assert times.reading["ssd"] == pytest.approx(nbytes * read)


def test_loading_that_hides_behind_computing_costs_its_first_layer():
    costs = machine(10, row=1e-3, place=0.0, read=1e-6, overlapped=True, window=2)
    times = costs.blend(Work(2, (Piece(1, 0, 1000, "ssd"),), "none", 0.0), [Piece(1, 0, 1000, "ssd")])
    assert times.load == pytest.approx(1e-6 * 1000 / 10)
    assert times.limit is None


def test_the_slowest_tier_holds_up_and_is_named():
    costs = machine(10, row=1e-9, place=0.0, read=1e-6, overlapped=True, window=2)
    costs.tier("remote").observe(1e-5)
    pieces = (Piece(10, 0, 5000, "ssd"), Piece(10, 10, 1000, "remote"))
    assert costs.blend(Work(30, pieces, "none", 0.0), pieces).limit == "remote"
    assert costs.blend(Work(30, pieces, "none", 0.0), pieces[:1]).limit == "ssd"


def test_rows_and_pairs_of_all_passes():
    job = work(4, 100, strategy="epic", ratio=0.1, question=20)
    [main] = passes(job, job.pieces[2:], layers=8)
    assert main.rows == pytest.approx(220 + 20)
    seen = 420**2 / 2 - 0.9 * (100 * 250 + 100 * 350)
    assert main == Pass("recompute", 0, 8, main.rows, pytest.approx(seen))


def test_what_may_not_be_repaired_is_not_counted_as_repaired():
    job = work(4, 100, strategy="epic", ratio=0.5, question=20, kept=(0, 1))
    [main] = passes(job, job.pieces, layers=8)
    assert main.rows == pytest.approx(20 + 100)


@pytest.mark.parametrize(
    ("strategy", "ratio", "expected"),
    [
        ("none", 0.2, [("recompute", 0, 8, 20)]),
        ("question", 0.0, [("recompute", 0, 8, 20)]),
        ("question", 0.1, [("select", 0, 6, 20), ("recompute", 0, 8, 60)]),
        ("hkvd", 0.1, [("recompute", 0, 1, 420), ("recompute", 1, 8, 60)]),
    ],
)
def test_the_passes_of_a_strategy(strategy, ratio, expected):
    job = work(4, 100, strategy=strategy, ratio=ratio, question=20)
    assert [(p.part, p.first, p.end, round(p.rows)) for p in passes(job, job.pieces, 8)] == expected


def test_looking_ahead_waits_for_nothing_that_is_loaded():
    """`links` repairs while the rest is read; `question` begins when three quarters have been."""
    costs = machine(24, row=1e-5, place=0.0, read=2.6e-9, overlapped=True, window=24)
    job = work(8, 100, strategy="links", token_bytes=24_000)
    times = costs.blend(replace(job, asking=32), job.pieces)
    reading = times.reading["ssd"]
    main = 24 * costs.sparse.seconds(passes(job, job.pieces, 24)[-1].rows, 0)
    assert reading <= times.total < reading + 0.2 * main
    asked = costs.blend(replace(job, strategy="question"), job.pieces)
    assert asked.total > times.total + 0.4 * main


def test_what_looks_ahead_is_the_question_alone_then_a_few_layers_keys():
    job = replace(work(4, 100, strategy="links", ratio=0.1, question=20), asking=25)
    ahead, scoring, main = passes(job, job.pieces, layers=32)
    assert (ahead.end, ahead.rows, ahead.pairs, ahead.alone) == (22, 25, 25**2 / 2, True)
    assert (scoring.end, scoring.rows, scoring.pairs, scoring.alone) == (4, 0, 25 * 420, False)
    assert (main.first, main.end, main.rows) == (0, 32, 20 + 40)
