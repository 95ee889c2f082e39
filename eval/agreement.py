"""How far an answer agrees with another one to the same prompt: full prefill's, as a rule.

Three measures, from the coarse to the fine: whether the answers say the same, for how many tokens they are the same,
and how far apart the distributions of the first token lie, which tells settings apart where all answers agree.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

import torch

_ARTICLES = frozenset({"a", "an", "the"})


def normalised(text: str) -> str:
    """``text`` as answers are compared: NFKC, case folded, single spaces, no punctuation around words, no articles.

    After SQuAD's (Rajpurkar et al. 2016), but what stands inside a word or makes a number negative stays, so that
    3.5 is not 35 and -5 not 5, and so does an answer that is nothing but an article or punctuation.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    bare = [word for word in map(_bare, words) if word]
    return " ".join([word for word in bare if word not in _ARTICLES] or bare or words)


def _bare(word: str) -> str:
    """``word`` without the punctuation around it."""
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]) and not _is_minus(word[start:end]):
        start += 1
    while start < end and _is_punctuation(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _is_minus(word: str) -> bool:
    return word[0] == "-" and word[1:2].isdigit()


def same_answer(one: str, other: str) -> bool:
    """Whether two answers say the same, after :func:`normalised`."""
    return normalised(one) == normalised(other)


def is_accepted(answer: str, accepted: Iterable[str]) -> bool:
    """Whether ``answer`` is one of the ``accepted`` ones."""
    return any(same_answer(answer, one) for one in accepted)


def token_agreement(reference: Sequence[int], other: Sequence[int], limit: int | None = None) -> float:
    """Share of two greedy continuations that is the same, 0 to 1: tokens before the first difference ÷ tokens of the
    longer one, of the first ``limit`` tokens each.

    What comes after a difference continues another text and is not compared. Two empty ones agree.
    """
    one, two = list(reference[:limit]), list(other[:limit])
    longer = max(len(one), len(two))
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return same / longer if longer else 1.0


def first_token_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL(reference ‖ other) in nats between next-token distributions, given as float32 logits (vocab,) each.

    0 where they are the same; infinite where ``other`` rules out what ``reference`` does not, or is not a number.
    """
    expected, found = (torch.log_softmax(logits.detach().double().cpu(), dim=-1) for logits in (reference, other))
    terms = torch.where(expected > -math.inf, expected.exp() * (expected - found), 0.0)
    divergence = float(terms.sum())
    return math.inf if math.isnan(divergence) else max(0.0, divergence)
