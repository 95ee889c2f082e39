"""Which setting is the cheapest that loses little enough: the search of a calibration, on whatever measures it.

Cost is the recomputed share first, then bytes. All methods and ratios are measured on a few questions; then the
cheapest is asked the rest, and the next one where it loses too much, until one holds. Who has lost so much that
agreement on all questions to come could not save it is asked no more, and questions that others lost come first: that
ends a bad setting's race early and changes no result. Codecs other than raw only add to a setting's loss, so they are
tried on what holds without them.
"""

from __future__ import annotations

import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from ragkv.eval.score import Interval, wilson

PILOT = 6
RAW = "raw"
_MOST_QUESTIONS = 10**9


class Candidate(NamedTuple):
    """A setting to try. ``none`` has ratio 0."""

    method: str
    ratio: float
    codec: str = RAW


class Mark(NamedTuple):
    """How a candidate fared on one question, beside full prefill.

    Attributes:
        agreement: 0 to 1; what is missing to 1 is the loss.
        tokens: share of the next tokens that are the same, along full prefill's answer.
        kl: of the first token's distribution, in nats.
        share: recomputed share.
        right: whether it is an accepted answer; None where none are known.
    """

    agreement: float
    tokens: float
    kl: float
    share: float
    right: bool | None = None


Measure = Callable[[Candidate, int], Mark]
Holds = Callable[[float], bool]


@dataclass
class Tally:
    """A candidate's marks so far, by question.

    Attributes:
        pilot: the questions that everybody is asked.
        total: how many questions there are.
        bytes_share: stored bytes ÷ those of raw.

    A candidate that was given up was asked hard questions, of which a mean says nothing: its figures are then those of
    the pilot, and its loss no less than what is known.
    """

    candidate: Candidate
    pilot: Sequence[int]
    total: int
    bytes_share: float = 1.0
    marks: dict[int, Mark] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.marks) == self.total

    @property
    def sample(self) -> list[Mark]:
        return list(self.marks.values()) if self.complete else [m for q, m in self.marks.items() if q in self.pilot]

    @property
    def lost(self) -> float:
        return sum(1.0 - mark.agreement for mark in self.marks.values())

    @property
    def loss(self) -> float:
        return max(self.lost / self.total, 1.0 - self.mean("agreement"))

    @property
    def interval(self) -> Interval:
        asked = len(self.sample)
        least = loss_interval(self.lost, self.total)[0]
        return least, max(least, loss_interval(asked * (1.0 - self.mean("agreement")), asked)[1])

    def mean(self, name: str, *, pilot: bool = False) -> float:
        sample = [self.marks[question] for question in self.pilot] if pilot else self.sample
        return statistics.fmean(getattr(mark, name) for mark in sample)

    @property
    def step(self) -> tuple[float, float]:
        """The cost, in whole percent: what differs by less is a tie."""
        return round(self.mean("share"), 2), round(self.bytes_share, 2)

    @property
    def order(self) -> tuple[float, ...]:
        """The cheaper first, then the better."""
        return *self.step, self.loss, self.mean("kl"), -self.mean("tokens")


class Finding(NamedTuple):
    """``chosen`` is None where nothing but full prefill is within the wanted loss. ``proven``: so says the interval's
    upper end, too, and not only the estimate. ``tallies`` are all that were measured, the chosen one included."""

    chosen: Tally | None
    proven: bool
    tallies: list[Tally]


def loss_interval(lost: float, asked: int) -> Interval:
    """95% Wilson interval of a mean loss. For losses between 0 and 1 it is too wide rather than too narrow: none of
    that mean vary more than those that are 0 or 1."""
    return wilson(lost, asked)


def questions_needed(wanted: float) -> int | None:
    """Fewest questions after which a setting that lost nothing is proven to lose at most ``wanted``; None: none are."""
    asked = range(1, _MOST_QUESTIONS)
    fewest = bisect_left(asked, True, key=lambda number: loss_interval(0, number)[1] <= wanted) + 1
    return fewest if fewest < _MOST_QUESTIONS else None


def grid(methods: Sequence[str], ratios: Sequence[float]) -> list[Candidate]:
    """Every method at every ratio; a repair of nothing is ``none``, whatever the method."""
    repairs = [Candidate(m, ratio) for ratio in ratios if ratio for m in methods if m != "none"]
    return [Candidate("none", 0.0), *repairs]


class Search:
    """Looks for the cheapest candidate that holds.

    Args:
        measure: marks a candidate on a question, given as a number below ``questions``.
        wanted: the loss to stay within, 0 to 1.
        bytes_share: stored bytes under each codec to try ÷ those of raw.
        say: progress, as stage, done and total.
    """

    def __init__(
        self,
        measure: Measure,
        questions: int,
        wanted: float,
        *,
        bytes_share: dict[str, float],
        say: Callable[[str, int, int], None],
    ) -> None:
        self._measure, self._questions, self._wanted = measure, questions, wanted
        self._bytes_share, self._say = bytes_share, say
        self._pilot = sorted(random.Random(0).sample(range(questions), min(PILOT, questions)))
        self._hardness = [0.0] * questions

    def run(self, candidates: Sequence[Candidate]) -> Finding:
        """Find the cheapest of ``candidates``, all raw, and its cheapest codec.

        Its interval must be within the wanted loss. Where no interval is, be it that too few questions are asked, the
        estimate must be.
        """
        tallies = [Tally(candidate, self._pilot, self._questions) for candidate in candidates]
        self._try_all(tallies)
        for proven, holds in ((True, self._is_proven), (False, self._is_likely)):
            if found := self._cheapest(tallies, holds):
                coded = self._coded(found)
                self._try_all(coded)
                held = self._all_that_hold(coded, holds)
                return Finding(min([*found, *held], key=attrgetter("order")), proven, [*tallies, *coded])
        return Finding(None, True, tallies)

    def _try_all(self, tallies: Sequence[Tally]) -> None:
        # Question by question: what a question needs is computed once and at hand for all.
        for at, question in enumerate(self._pilot):
            for number, tally in enumerate(tallies):
                self._ask(tally, question)
                self._say("pilot", at * len(tallies) + number + 1, len(self._pilot) * len(tallies))

    def _cheapest(self, tallies: Sequence[Tally], holds: Holds) -> list[Tally]:
        """All that hold, of the least cost at which any does."""
        ordered = sorted(tallies, key=attrgetter("order"))
        steps = [list(group) for _, group in groupby(ordered, key=attrgetter("step"))]
        found: list[Tally] = []
        for number, group in enumerate(steps):
            self._say("narrow", number, len(steps))
            if found := self._all_that_hold(group, holds):
                break
        self._say("narrow", len(steps), len(steps))
        return found

    def _coded(self, found: Sequence[Tally]) -> list[Tally]:
        return [
            Tally(tally.candidate._replace(codec=codec), self._pilot, self._questions, share)
            for tally in found
            for codec, share in self._bytes_share.items()
            if share < 1
        ]

    def _all_that_hold(self, group: Sequence[Tally], holds: Holds) -> list[Tally]:
        """Those of ``group`` that hold after all questions, the hardest first: which were lost most, by whomsoever."""
        for number, tally in enumerate(group):
            left = [question for question in range(self._questions) if question not in tally.marks]
            for question in sorted(left, key=lambda one: -self._hardness[one]):
                if not holds(tally.lost):
                    break
                self._ask(tally, question)
                self._say("ask", number * self._questions + len(tally.marks), len(group) * self._questions)
        return [tally for tally in group if holds(tally.lost)]

    def _ask(self, tally: Tally, question: int) -> None:
        tally.marks[question] = mark = self._measure(tally.candidate, question)
        self._hardness[question] += 1.0 - mark.agreement

    def _is_proven(self, lost: float) -> bool:
        return loss_interval(lost, self._questions)[1] <= self._wanted

    def _is_likely(self, lost: float) -> bool:
        # Losses add up in floating point.
        return lost <= self._wanted * self._questions + 1e-9
