"""How methods and figures are drawn and called, the same in every plot and report."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """A method's colour on white and on black, and matplotlib's name of its marker."""

    light: str
    dark: str
    marker: str


# Okabe and Ito's palette: told apart by colour-blind readers, and in print by the markers.
_LOOKS = {
    "links": Look("#7A4FBF", "#B79CED", "P"),
    "question": Look("#0072B2", "#56B4E9", "o"),
    "hkvd": Look("#D55E00", "#F08A4B", "s"),
    "epic": Look("#009E73", "#3CC79A", "^"),
    "echo": Look("#8A6D00", "#F0E442", "X"),
    "random": Look("#999999", "#8C8C8C", "v"),
    "none": Look("#000000", "#F2F2F2", "D"),
    "default": Look("#CC79A7", "#E39BC3", "*"),
    "full": Look("#333333", "#BDBDBD", "o"),
}
_OTHERS = (Look("#A3242B", "#F2777E", "p"), Look("#00707A", "#5FD3DC", "p"))
_PREEMPTIONS = {
    "recompute": Look("#D55E00", "#F08A4B", "s"),
    "blockwise": Look("#999999", "#8C8C8C", "v"),
    "groups": Look("#CC79A7", "#E39BC3", "D"),
    "async": Look("#0072B2", "#56B4E9", "o"),
    "reuse": Look("#009E73", "#3CC79A", "^"),
}
FLOOR = Look("#E69F00", "#FFB92E", "|")
METRIC_NAMES = {
    "exact_match": "exact match",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "token_agreement": "token agreement with full",
    "answer_match": "same answer as full",
}


def look(method: str) -> Look:
    """How ``method`` is drawn; methods that came later than this table take turns."""
    return _LOOKS.get(method) or _OTHERS[sum(map(ord, method)) % len(_OTHERS)]


def preemption_look(way: str) -> Look:
    """How a way to preempt is drawn."""
    return _PREEMPTIONS.get(way, _OTHERS[0])


def looks() -> list[Look]:
    """Every look there is, in one order."""
    return [*_LOOKS.values(), *_OTHERS, *_PREEMPTIONS.values()]


def in_turn(methods: set[str]) -> list[str]:
    """``methods`` in the order of the table, others behind."""
    return sorted(methods, key=lambda method: (method not in _LOOKS, [*_LOOKS, method].index(method), method))
