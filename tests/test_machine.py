"""What is made of a machine's measured times."""

from __future__ import annotations

import pytest

from ragkv.machine import undisturbed

DENSE = [(16, 1.0), (64, 2.0), (256, 6.0), (1024, 20.0)]
SPARSE = [(16, 1.2), (64, 1.9), (256, 6.5), (1024, 24.0)]


def test_what_fits_together_stays_as_it_was_measured():
    assert undisturbed(DENSE, SPARSE) == (DENSE, SPARSE)


@pytest.mark.parametrize("knot", range(4))
def test_a_disturbed_measurement_is_bounded_by_its_neighbours_and_its_twin(knot):
    spoilt = [(rows, 9 * seconds if i == knot else seconds) for i, (rows, seconds) in enumerate(SPARSE)]
    dense, sparse = undisturbed(DENSE, spoilt)
    assert dense == DENSE
    assert SPARSE[knot][1] <= sparse[knot][1] <= 1.5 * DENSE[knot][1]
    assert [one for i, one in enumerate(sparse) if i != knot] == [one for i, one in enumerate(SPARSE) if i != knot]
    other, same = undisturbed(spoilt, SPARSE)
    assert same == SPARSE
    assert other[knot][1] <= 1.5 * SPARSE[knot][1]


def test_fewer_rows_never_take_longer():
    dense, sparse = undisturbed([(16, 8.0), (64, 2.0)], [(16, 9.0), (64, 2.5)])
    assert dense == [(16, 2.0), (64, 2.0)]
    assert sparse == [(16, 2.5), (64, 2.5)]
