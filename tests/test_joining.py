"""When it pays to run a layer for several prompts at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ragkv.costs import Curve, Machine
from ragkv.joining import Load, pays
from tests.serving_kit import machine

LEVEL = machine((1000, 1.0))
RISING = machine((1, 0.001), (1000, 1.0))
BENT = machine((200, 1.0), (1000, 5.0))  # the weights are read as long as there are 200 rows


def loads(*rows: int) -> list[Load]:
    return [Load(count, 0.0) for count in rows]


@pytest.mark.parametrize(
    ("costs", "ahead", "another", "behind", "joins"),
    [
        (LEVEL, [5], 900, 0, True),
        (RISING, [100], 100, 0, False),
        (RISING, [100], 100, 1000, False),  # nothing is saved, whoever waits
        (BENT, [100], 100, 0, True),
        (BENT, [145], 145, 0, True),  # 1.45 s for both, against 1 s for one and 2 s for the other
        (BENT, [155], 155, 0, False),
        (BENT, [155], 155, 1, True),  # against 1 s, 2 s, and 2 s for who waits
        (BENT, [180], 180, 1, False),
        (BENT, [180], 180, 20, True),
        (BENT, [100], 600, 0, False),  # few rows do not wait for many
        (BENT, [600], 60, 0, True),
        (BENT, [600], 110, 0, False),  # nor many for few, where that holds up more than it saves
        (BENT, [100, 60], 80, 0, True),  # 1.2 s for three, against 1 s for two and 2 s for one
        (BENT, [100, 60], 120, 0, False),
        (BENT, [100, 60], 120, 2, True),
    ],
)
def test_all_must_be_through_no_later_in_the_mean(costs, ahead, another, behind, joins):
    assert pays(costs, loads(*ahead), *loads(another), behind) == joins


def test_attention_is_done_one_after_the_other_all_the_same():
    curve = Curve([(200, 1.0), (1000, 5.0)], per_pair=1e-3)
    costs = Machine(4, curve, curve, 0.0, {})
    assert pays(costs, [Load(100, 0.0)], Load(100, 800.0), 0)
    assert not pays(costs, [Load(100, 0.0)], Load(100, 1100.0), 0)
    assert pays(costs, [Load(100, 1100.0)], Load(100, 0.0), 0)  # what is ahead takes its time in any case


def test_who_must_be_waited_for_saves_less():
    assert pays(LEVEL, loads(5), Load(5, 0.0, wait=0.8), 0)
    assert not pays(LEVEL, loads(5), Load(5, 0.0, wait=1.1), 0)


def test_a_device_computes_while_the_host_waits():
    costs = machine((1000, 1.0), overlapped=True)
    assert pays(costs, loads(5), Load(5, 0.0, wait=1.8), 0)
    assert not pays(costs, loads(5), Load(5, 0.0, wait=2.1), 0)


def test_launching_a_layer_for_several_takes_its_time_however_few_rows_they_have():
    """For one alone it may be captured, and launched at once."""
    assert pays(replace(LEVEL, together=1.4), loads(5), Load(5, 0.0), 0)
    assert not pays(replace(LEVEL, together=1.6), loads(5), Load(5, 0.0), 0)
