"""Blended prompts of every kind, for every family, beside the library's own forward."""

from __future__ import annotations

import os
import random

import pytest

from tests.parity_kit import FACTORS, SHARE, VARIANTS, Bench, Case, all_pairs, everything, pairs, pairs_of, share

CRUCIAL = {name: FACTORS[name] for name in ("layout", "strategy", "kv", "codec", "prefix", "ratio")}
CHANCE = {name: levels for name, levels in FACTORS.items() if name not in CRUCIAL}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a power cut is not among the circumstances here
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.parametrize("family", VARIANTS)
def test_a_third_of_any_two_circumstances(bench, family):
    assert bench.faults(share(family, SHARE)) == []


def test_the_thirds_of_all_families_are_the_whole():
    """Any two circumstances meet, and every family meets every circumstance."""
    factors = {"family": tuple(VARIANTS), **FACTORS}
    met = set().union(*(pairs_of(case, factors) for family in VARIANTS for case in share(family, SHARE)))
    assert all_pairs(factors) - met == set()


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_any_two_circumstances_in_every_family(bench, family):
    assert bench.faults(pairs(family)) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_all_circumstances_together(bench, family):
    """The full product of what decides which KV is where; dtype, company, tier and library's attention by chance."""
    chance = random.Random(family)
    cases = [
        Case(**{**vars(case), **{name: chance.choice(levels) for name, levels in CHANCE.items()}})
        for case in everything(family, CRUCIAL)
    ]
    bench.slack = 2.5
    for start in range(0, len(cases), 48):
        assert bench.faults(cases[start : start + 48], seed=start) == []
