"""How good an answer is beside the accepted ones: SQuAD's exact match and F1, and ROUGE-L. All from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


def squad_normalised(text: str) -> str:
    """``text`` as SQuAD's official script compares it: lower case, without punctuation, articles and extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Whether ``answer`` is one of ``golds``, once normalised (Rajpurkar et al. 2016)."""
    return float(squad_normalised(answer) in {squad_normalised(gold) for gold in golds})


def f1(answer: str, golds: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of ``answer``'s words, against the gold it fits best (SQuAD 2.0's)."""
    return max(_word_f1(squad_normalised(answer).split(), squad_normalised(gold).split()) for gold in golds)


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, against the gold it fits best (Lin 2004).

    As Google's ``rouge-score`` has it without stemming, except that letters of all scripts make words.
    """
    words = _WORD.findall(answer.lower())
    return max(_lcs_f1(words, _WORD.findall(gold.lower())) for gold in golds)


def _word_f1(words: Sequence[str], gold: Sequence[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    return _harmonic((Counter(words) & Counter(gold)).total(), len(words), len(gold))


def _lcs_f1(words: Sequence[str], gold: Sequence[str]) -> float:
    if not words or not gold:
        return 0.0
    row = [0] * (len(gold) + 1)
    for word in words:
        diagonal = 0
        for i, other in enumerate(gold, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return _harmonic(row[-1], len(words), len(gold))


def _harmonic(common: int, length: int, other: int) -> float:
    """The harmonic mean of precision ``common / length`` and recall ``common / other``."""
    return 2 * common / (length + other)
