"""What a prefill takes on this machine: seconds as functions of rows, keys and bytes, corrected by every request.

Pure arithmetic over numbers that somebody else measured, so that a simulated machine is as good as a real one.
docs/blending.md has the formulae.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from ragkv.methods import CHECK_LAYER, Outline, outline, parameters

_NOISE = math.log(1.15)
_NOISE_GAIN, _NEWS_GAIN = 0.3, 0.8
# What was not measured for so many requests may have become better meanwhile, by so much at the most.
STALE_AFTER = 16
HOPE = 0.8
# Of a tier that nobody has read from yet: slow, so that nobody waits for what may be a bad disk.
GUESSED_SECONDS_PER_BYTE = {"ram": 1 / 20e9, "ssd": 1 / 200e6, "remote": 1 / 50e6}


class Estimate:
    """A positive quantity, such as seconds per byte, that is measured again and again.

    Good news is believed at once: nothing is faster than the machine by accident. Bad news beyond ordinary noise is
    believed when it comes twice in a row: a hiccup is no trend. The first measurement replaces a guess.
    """

    def __init__(self, value: float, *, guessed: bool = False) -> None:
        self.value, self.guessed = value, guessed
        self.age = 0
        self._previous = 0.0

    def observe(self, measured: float) -> float:
        """Take a measurement in; returns the factor by which ``value`` changed."""
        self.age = 0
        news = math.log(measured / self.value)
        if self.guessed:
            believed, self.guessed = news, False
        elif abs(news) < _NOISE:
            believed = _NOISE_GAIN * news
        else:
            believed = _NEWS_GAIN * (news if news < 0 else min(news, max(self._previous, 0.0)))
        self._previous = news
        self.value *= math.exp(believed)
        return math.exp(believed)

    @property
    def stale(self) -> bool:
        return self.guessed or self.age >= STALE_AFTER


class Curve:
    """Seconds that one layer takes over some rows.

    Args:
        knots: (rows, seconds), rows ascending: what all but attention takes. Straight between them, level below the
            first (launching, reading the weights), in proportion above the last.
        per_pair: attention's seconds for one row looking at one key.
    """

    def __init__(self, knots: Sequence[tuple[int, float]], per_pair: float) -> None:
        self._rows = [float(rows) for rows, _ in knots]
        self._seconds = [seconds for _, seconds in knots]
        self.per_pair = per_pair
        self.scale = Estimate(1.0)

    def seconds(self, rows: float, pairs: float, *, hope: bool = False) -> float:
        """``hope``: what it may take by now if it was not measured lately."""
        seconds = self._linear(rows) + self.per_pair * pairs
        return HOPE * seconds if hope and self.scale.stale else seconds

    def observe(self, rows: float, pairs: float, seconds: float) -> None:
        """One layer took ``seconds``: knots near ``rows`` follow most, all of them somewhat."""
        factor = math.log(self.scale.observe(self.scale.value * seconds / self.seconds(rows, pairs)))
        self.per_pair *= math.exp(factor)
        for i, knot in enumerate(self._rows):
            away = abs(math.log2(min(max(rows, 1.0), self._rows[-1]) / knot))
            self._seconds[i] *= math.exp(factor * max(0.25, 1.0 - away / 4))

    def _linear(self, rows: float) -> float:
        at = bisect_left(self._rows, rows)
        if at == 0:
            return self._seconds[0]
        if at == len(self._rows):
            return self._seconds[-1] * rows / self._rows[-1]
        low, high = self._rows[at - 1 : at + 1]
        below, above = self._seconds[at - 1 : at + 1]
        return below + (above - below) * (rows - low) / (high - low)


@dataclass(frozen=True)
class Piece:
    """A chunk whose stored KV could be loaded: ``tokens`` of the prompt from ``start`` on, ``nbytes`` on ``tier``."""

    tokens: int
    start: int
    nbytes: int
    tier: str
    repairable: bool = True

    @property
    def pairs(self) -> float:
        return self.tokens * (self.start + self.tokens / 2)


@dataclass(frozen=True)
class Work:
    """A prompt of ``length`` tokens, ``pieces`` of which are stored; ``ratio`` of the loaded ones is repaired.
    ``asking`` tokens look ahead, or ``check_layer`` layers run over all tokens, where a strategy wants it. KV of the
    first ``known`` tokens, in front of all pieces, is there."""

    length: int
    pieces: tuple[Piece, ...]
    strategy: str
    ratio: float
    asking: int = 0
    check_layer: int = CHECK_LAYER
    known: int = 0

    @property
    def rows(self) -> int:
        """What a full prefill computes."""
        return self.length - self.known

    @property
    def pairs(self) -> float:
        """The keys that these look at."""
        return (self.length**2 - self.known**2) / 2


@dataclass(frozen=True)
class Pass:
    """Layers ``first … end - 1`` over ``rows`` that look at ``pairs`` keys in all; ``part`` is the watch's. ``alone``:
    over nothing that is loaded."""

    part: str
    first: int
    end: int
    rows: float
    pairs: float
    alone: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds. ``load`` is what computing waits for; ``reading`` what each tier takes by itself, hidden or not.

    ``limit``: the tier that holds everything up, None where computing does.
    """

    total: float
    load: float = 0.0
    select: float = 0.0
    recompute: float = 0.0
    reading: dict[str, float] = field(default_factory=dict)
    limit: str | None = None


@dataclass
class Machine:
    """The costs of one model on one machine.

    Attributes:
        dense: a full prefill's layer.
        sparse: a layer over some rows of a prompt whose other keys are there already.
        head: seconds from the last layer to the logits.
        tiers: seconds per byte. All bytes take the way from RAM into the request's KV, some come from a slower
            tier before.
        overlapped: bytes move from RAM into the KV while others are computed (a GPU), not in turn with them.
        window: layers that are read ahead.
        selecting: by strategy, how much longer its selecting takes than its rows would.
        together: seconds that a layer for several prompts takes at least: its kernels are launched one by one.
    """

    layers: int
    dense: Curve
    sparse: Curve
    head: float
    tiers: dict[str, Estimate]
    overlapped: bool = False
    window: int = 2
    selecting: dict[str, Estimate] = field(default_factory=dict)
    together: float = 0.0

    def tier(self, name: str) -> Estimate:
        if name not in self.tiers:
            guess = GUESSED_SECONDS_PER_BYTE.get(name, GUESSED_SECONDS_PER_BYTE["ram"])
            self.tiers[name] = Estimate(guess, guessed=True)
        return self.tiers[name]

    def selector(self, strategy: str) -> Estimate:
        if strategy not in self.selecting:
            self.selecting[strategy] = Estimate(1.0, guessed=True)
        return self.selecting[strategy]

    def tick(self, *, measured: bool = True) -> None:
        """One more request: what it does not measure is one request older. Computing, only if it was ``measured``: on a
        busy machine it hardly ever is, and trying it again would not measure it either."""
        for estimate in (*self.tiers.values(), *((self.dense.scale, self.sparse.scale) if measured else ())):
            estimate.age += 1

    def full(self, work: Work, *, hope: bool = False) -> Times:
        """A full prefill."""
        spent = self.layers * self.dense.seconds(work.rows, work.pairs, hope=hope) + self.head
        return Times(spent, recompute=spent)

    def blend(self, work: Work, loaded: Sequence[Piece], *, hope: bool = False) -> Times:
        """A prefill that loads ``loaded`` and computes the rest; layer i is read while layers before it compute."""
        nbytes: dict[str, int] = {}
        for piece in loaded:
            nbytes[piece.tier] = nbytes.get(piece.tier, 0) + piece.nbytes
        placing = sum(nbytes.values()) * self.tier("ram").value
        reading = {name: count * self.tier(name).value for name, count in nbytes.items() if name != "ram"}
        waits = dict(reading, ram=placing) if self.overlapped else reading
        slowest = max(waits, key=lambda name: waits[name], default=None)
        line = _Timeline(
            read=waits[slowest] / self.layers if slowest else 0.0,
            place=0.0 if self.overlapped else placing / self.layers,
            window=self.window,
        )
        parts = {"select": 0.0, "recompute": self.head}
        for one in passes(work, loaded, self.layers):
            seconds = self.sparse.seconds(one.rows, one.pairs, hope=hope)
            if one.part == "select":
                seconds *= self.selector(work.strategy).value
            parts[one.part] += seconds * (one.end - one.first)
            if one.alone:
                line.pass_by((one.end - one.first) * seconds)
            else:
                line.run(one.first, one.end, seconds)
        load = line.now + self.head - sum(parts.values())
        limit = slowest if load > 0.1 * line.now else None
        return Times(
            line.now + self.head, load, parts["select"], parts["recompute"], {"ram": placing, **reading}, limit
        )


def passes(work: Work, loaded: Sequence[Piece], layers: int) -> list[Pass]:
    """What a strategy runs, in order: its selecting, if any, and the rows it repairs with those it must compute."""
    rows = work.rows - sum(piece.tokens for piece in loaded)
    pairs = work.pairs - sum(piece.pairs for piece in loaded)
    ratio = work.ratio if "ratio" in parameters(work.strategy) else 0.0
    able = [piece for piece in loaded if piece.repairable]
    repaired, their_pairs = ratio * sum(p.tokens for p in able), ratio * sum(p.pairs for p in able)
    first = outline(work.strategy, layers, work.check_layer) if repaired else Outline()
    steps: list[Pass] = []
    if first.searched:
        steps.append(Pass("select", 0, first.ahead, work.asking, work.asking**2 / 2, alone=True))
        # These layers are loaded before the others, so that they count as the first.
        steps.append(Pass("select", 0, len(first.searched), 0, work.asking * work.length))
    if first.asked:
        steps.append(Pass("select", 0, first.asked.stop, rows, pairs))
    if first.dense:
        steps.append(Pass("recompute", 0, first.dense, rows + repaired / ratio, pairs + their_pairs / ratio))
    return [*steps, Pass("recompute", first.dense, layers, rows + repaired, pairs + their_pairs)]


class _Timeline:
    """Computing and reading side by side: ``read`` seconds a layer, ``place`` in turn with computing.

    ``ahead`` counts layers that were read and not placed yet, at most ``window``.
    """

    def __init__(self, *, read: float, place: float, window: int) -> None:
        self._read, self._place, self._window = read, place, window
        self.now = 0.0
        self._placed = 0
        self._ahead = 0.0

    def run(self, first: int, end: int, seconds: float) -> None:
        """Compute layers ``first … end - 1``, ``seconds`` each, as soon as each is placed.

        Within one pass all layers take the same, so that either its first or its last layer holds it up.
        """
        again = min(end, max(first, self._placed)) - first
        self._advance(self.now + again * seconds, placed=0)
        new = end - first - again
        if new:
            step = seconds + self._place
            first_there = max(0.0, 1 - self._ahead) * self._read
            last_there = max(0.0, new - self._ahead) * self._read
            self._advance(self.now + max(first_there + new * step, last_there + step), placed=new)
            self._placed = end

    def pass_by(self, seconds: float) -> None:
        """Something is computed that needs nothing."""
        self._advance(self.now + seconds, placed=0)

    def _advance(self, until: float, placed: int) -> None:
        read = (until - self.now) / self._read if self._read else math.inf
        self._ahead = min(float(self._window), max(0.0, self._ahead + read - placed))
        self.now = until
