"""Seconds by size: straight between what was measured, and moved by no single run."""

from __future__ import annotations

import pytest

from ragkv.durations import Durations


def test_nothing_is_known_before_anything_was_measured():
    assert Durations().seconds(5) is None


def test_straight_from_nothing_through_what_was_measured_and_on_in_proportion():
    durations = Durations()
    durations.observe(400, 6.0)
    durations.observe(100, 3.0)
    assert [durations.seconds(size) for size in (0, 50, 100, 200, 400, 800)] == [0.0, 1.5, 3.0, 4.0, 6.0, 12.0]


def test_one_run_that_was_held_up_is_no_news():
    durations = Durations()
    for seconds in (1.0, 50.0):
        durations.observe(100, seconds)
    assert durations.seconds(100) == 1.0
    for seconds in (1.0, 1.0, 90.0, 0.01):
        durations.observe(100, seconds)
    assert durations.seconds(100) == 1.0


def test_what_stays_slow_is_believed():
    durations = Durations()
    for seconds in [1.0] * 9 + [3.0] * 5:
        durations.observe(100, seconds)
    assert durations.seconds(100) == 3.0


def test_more_never_takes_less():
    durations = Durations()
    durations.observe(100, 3.0)
    durations.observe(1000, 2.0)
    assert durations.seconds(100) == durations.seconds(1000) == 3.0


def test_sizes_of_one_class_stand_together_and_others_apart():
    durations = Durations()
    for size in (64, 100, 127):
        durations.observe(size, size / 100)
    durations.observe(128, 9.0)
    assert durations.seconds(100) == 1.0
    assert durations.seconds(128) == pytest.approx(9.0)
