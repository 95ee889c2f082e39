"""The measures of agreement: what counts as the same answer, and what does not."""

from __future__ import annotations

import math

import pytest
import torch

from ragkv.eval.agreement import first_token_kl, is_accepted, normalised, same_answer, token_agreement


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Dralio Roshouse", " dralio  roshouse.\n"),
        ("The Eiffel Tower", "Eiffel tower!"),
        ("“July”", "july"),
        ("18", "18."),
        ("ﬁne", "fine"),  # a ligature
        ("a", "A."),
        ("", "  "),
    ],
)
def test_answers_that_say_the_same(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("July", "June"),
        ("3.5", "35"),
        ("-5", "5"),
        ("1,000", "1000.5"),
        ("A", "the"),  # choice A, and a stray article: neither is an empty answer
        ("?", "!"),
        ("yes", ""),
        ("C++", "C"),
    ],
)
def test_answers_that_do_not(one: str, other: str) -> None:
    assert not same_answer(one, other)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("The «Great» Wall, (of China).", "-5 °C", "a", "...", "state-of-the-art"):
        assert normalised(normalised(text)) == normalised(text)


def test_an_accepted_answer_is_any_of_them() -> None:
    assert is_accepted("the fourth of July.", ["July 4", "fourth of july"])
    assert not is_accepted("July", ["July 4"])
    assert not is_accepted("July", [])


@pytest.mark.parametrize(
    ("reference", "other", "limit", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], None, 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], None, 0.5),  # the 4 continues another text
        ([1, 2, 3, 4], [1, 2], None, 0.5),
        ([1, 2], [1, 2, 3, 4], None, 0.5),
        ([1, 2, 3, 4], [1, 2, 9, 4], 2, 1.0),
        ([5], [6], None, 0.0),
        ([], [1], None, 0.0),
        ([], [], None, 1.0),
    ],
)
def test_tokens_agree_up_to_the_first_difference(
    reference: list[int], other: list[int], limit: int | None, share: float
) -> None:
    assert token_agreement(reference, other, limit) == share


def test_divergence_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    # A constant added to logits changes no distribution.
    assert first_token_kl(p.log() + 3.0, q.log()) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert first_token_kl(q.log(), p.log()) > 0


def test_equal_logits_diverge_by_nothing_however_large_they_are() -> None:
    seeded = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, generator=seeded) * 100
    assert first_token_kl(logits, logits.clone()) == 0.0
    assert first_token_kl(logits, logits + 1e-4 * torch.randn(5000, generator=seeded)) >= 0.0


def test_what_one_rules_out() -> None:
    both, first = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf])
    assert first_token_kl(first, both) == pytest.approx(math.log(2))
    assert first_token_kl(both, first) == math.inf
    assert first_token_kl(both, torch.tensor([math.nan, 0.0])) == math.inf
