"""Choosing the next token."""

from __future__ import annotations

import pytest
import torch

from ragkv.sampling import Sampler

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def draws(sampler: Sampler, count: int = 300, logits: torch.Tensor = LOGITS) -> list[int]:
    return [sampler(logits) for _ in range(count)]


def test_greedy_takes_the_most_likely():
    assert set(draws(Sampler(), 5)) == {1}


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_drawn():
    first = Sampler(temperature=1.0, seed=7)
    torch.manual_seed(1)
    expected = draws(first, 50)
    second, other = Sampler(temperature=1.0, seed=7), Sampler(temperature=1.0, seed=8)
    got = []
    for _ in range(50):
        torch.rand(3)
        other(LOGITS)
        got.append(second(LOGITS))
    assert got == expected
    assert draws(Sampler(temperature=1.0, seed=8), 50) != expected


def test_without_a_seed_two_samplers_differ():
    logits = torch.zeros(1000)
    assert draws(Sampler(temperature=1.0), 20, logits) != draws(Sampler(temperature=1.0), 20, logits)


def test_sampling_follows_the_distribution():
    tokens = torch.tensor(draws(Sampler(temperature=0.7, seed=0), 4000))
    shares = torch.bincount(tokens, minlength=5) / 4000
    assert torch.allclose(shares, (LOGITS / 0.7).softmax(0), atol=0.03)


def test_top_k_draws_among_the_k_best_and_from_all_of_them():
    assert set(draws(Sampler(temperature=2.0, top_k=3, seed=0))) == {1, 4, 2}
    assert set(draws(Sampler(temperature=9.0, top_k=99, seed=0))) == {0, 1, 2, 3, 4}
    assert set(draws(Sampler(temperature=9.0, top_k=1, seed=0))) == {1}


def test_top_p_draws_from_the_smallest_set_that_holds_the_mass():
    probabilities = LOGITS.softmax(0).sort(descending=True).values
    two = float(probabilities[:2].sum())
    assert set(draws(Sampler(temperature=1.0, top_p=two - 0.01, seed=0))) == {1, 4}
    assert set(draws(Sampler(temperature=1.0, top_p=two + 0.01, seed=0))) == {1, 4, 2}
    assert set(draws(Sampler(temperature=1.0, top_p=1e-9, seed=0))) == {1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_ends_in_the_most_likely_token(temperature):
    assert set(draws(Sampler(temperature=temperature, seed=0), 20, LOGITS * 50)) == {1}


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    assert set(draws(Sampler(temperature=10.0, seed=0), 100, logits)) == {1, 3}
