"""Load or compute: for every prompt the fastest way that keeps the quality asked for.

Three ways are compared: full prefill; blending; and blending with some stored chunks computed instead of loaded, so
that loading and computing end together. The ratio asked for is a floor: computing more is always allowed, computing
less never. Every request's timings correct the costs (:mod:`ragkv.costs`).

Not thread-safe but for :meth:`Controller.stats`: the engine thread owns it.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Literal

from ragkv.costs import Machine, Piece, Times, Work, passes
from ragkv.types import Forecast

# Full prefill is exact, so blending must win by more than the error of a good prediction.
MARGIN = 0.03
# And by what the last one came late by, up to a quarter, which counts less with every prompt: half after seven.
_MOST_MARGIN, _FADE = 0.25, 0.9
_SPLITS = 12
_REMEMBERED = 64
_LEAST = 1e-6


@dataclass(frozen=True)
class Reading:
    """``nbytes`` came from ``tier`` in ``seconds`` of its own speed: the time in which computing waited for it."""

    tier: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Actual:
    """What a prefill took, in seconds, without its time in queues.

    ``waited``: the part of ``load`` spent waiting for slabs. ``contended``: the device did others' work in between,
    so that only ``readings`` say anything.
    """

    total: float
    load: float = 0.0
    select: float = 0.0
    recompute: float = 0.0
    waited: float = 0.0
    readings: Sequence[Reading] = ()
    contended: bool = False


@dataclass(frozen=True)
class Choice:
    """How to go about a prompt: load ``loaded`` (indices of the work's pieces), compute the rest.

    ``times`` are predicted for it, ``full`` for a full prefill, ``blend`` for loading everything. ``beside``: a piece
    that is not loaded and should be read while others compute.
    """

    work: Work
    loaded: tuple[int, ...]
    times: Times
    full: Times
    blend: Times
    why: str
    beside: int | None = None

    @property
    def way(self) -> Literal["full", "blend", "split"]:
        if not self.loaded:
            return "full"
        return "blend" if len(self.loaded) == len(self.work.pieces) else "split"

    @property
    def pieces(self) -> list[Piece]:
        return [self.work.pieces[i] for i in self.loaded]

    def why_computed(self, piece: int) -> str:
        """What to say of a piece that is stored and was not loaded."""
        tier = self.work.pieces[piece].tier
        return self.why if self.way == "full" else f"computed: faster than loading it from {tier}"


class Controller:
    """Chooses, and learns from what came of it.

    Args:
        machine: what is known of this machine's speed; None until it was measured. Without it everything is done as
            asked.
        warms: with every prompt have a piece read that was not loaded, so that it is in RAM next time; otherwise only
            now and then, to see how fast its tier has become.
    """

    def __init__(self, machine: Machine | None = None, *, warms: bool = False) -> None:
        self.machine, self._warms = machine, warms
        self._reading_beside = False
        self._heard: SimpleQueue[list[Reading]] = SimpleQueue()
        self._counts: Counter[str] = Counter()
        self._errors: deque[float] = deque(maxlen=_REMEMBERED)
        self._late: dict[str, float] = {}

    def margin(self, tier: str) -> float:
        """The share of a full prefill's time by which loading from ``tier`` must win. What the costs do not know of
        (threads that read a disk hold up the one that launches) makes prompts late, which shows here."""
        return min(max(MARGIN, self._late.get(tier, 0.0)), _MOST_MARGIN)

    def choose(self, work: Work) -> Choice | None:
        """The fastest way, or None where there is nothing to choose from or nothing is known yet."""
        if self.machine is None or not work.pieces:
            return None
        self._listen(self.machine)
        self._late = {tier: late * _FADE for tier, late in self._late.items()}
        machine = self.machine
        full, blend = machine.full(work), machine.blend(work, work.pieces)
        times = {tuple(range(len(work.pieces))): blend}
        if blend.load > MARGIN * blend.total:
            # Computing some pieces only helps where loading all of them holds up computing.
            times |= _splits(machine, work, blend)
        best = min(times, key=lambda loaded: times[loaded].total)
        if times[best].total >= blend.total * (1 - MARGIN):
            best = tuple(range(len(work.pieces)))  # no more is computed for a gain that may be none
        margin = self.margin(_slowest(work, best))
        if times[best].total >= full.total * (1 - margin):
            choice = Choice(work, (), full, full, blend, _why_full(full, times[best], blend, margin))
        else:
            choice = Choice(work, best, times[best], full, blend, _why_blend(times[best], full))
        return self._beside(self._exploring(choice, times) or choice)

    def learn(self, choice: Choice, actual: Actual) -> Forecast:
        """Correct the costs by what a prefill took; returns prediction and outcome for its report."""
        self._counts[choice.way] += 1
        self._counts["computed"] += len(choice.work.pieces) - len(choice.loaded)
        if self.machine is not None:
            self.machine.tick(measured=not actual.contended)
            for reading in actual.readings:
                self.machine.tier(reading.tier).observe(reading.seconds / reading.nbytes)
            if not actual.contended:
                _correct(self.machine, choice, actual)
                if choice.loaded:  # late by what the costs have not made their own
                    expected = self.machine.blend(choice.work, choice.pieces).total
                    self._late[_slowest(choice.work, choice.loaded)] = actual.total / expected - 1
        if not actual.contended:
            self._errors.append(abs(actual.total / choice.times.total - 1))
        return _forecast(choice, actual)

    def hear(self, readings: Sequence[Reading]) -> None:
        """What reading a choice's ``beside`` gave, nothing if it failed. From any thread, once for each."""
        self._heard.put(list(readings))

    def stats(self) -> dict[str, float]:
        """Numbers for a metrics page: how often what was chosen, the median error of the last predictions of the
        total, what loading must win by, and the tiers' rates in bytes per second."""
        errors = list(self._errors)
        tiers: Mapping[str, float] = {}
        if self.machine is not None:
            tiers = {name: 1 / one.value for name, one in list(self.machine.tiers.items())}
        return {
            "controller_full": self._counts["full"],
            "controller_blend": self._counts["blend"],
            "controller_split": self._counts["split"],
            "controller_explored": self._counts["explored"],
            "controller_chunks_computed": self._counts["computed"],
            "controller_error": statistics.median(errors) if errors else 0.0,
            "controller_margin": max(map(self.margin, list(self._late)), default=MARGIN),
            **{f"controller_{name}_bytes_per_second": rate for name, rate in tiers.items()},
        }

    def _listen(self, machine: Machine) -> None:
        while not self._heard.empty():
            self._reading_beside = False
            for reading in self._heard.get():
                tier, measured = machine.tier(reading.tier), reading.seconds / reading.nbytes
                # One piece alone, beside computing, may be read slower than several: only good news count.
                tier.observe(measured if tier.guessed else min(measured, tier.value))

    def _beside(self, choice: Choice) -> Choice:
        """``choice`` with a piece to read beside it, one at a time, if one is to be warmed or its tier was not measured
        for long."""
        machine, pieces = self.machine, choice.work.pieces
        if machine is None or self._reading_beside:
            return choice
        left = [
            i
            for i in range(len(pieces))
            if i not in choice.loaded
            and pieces[i].tier in ("ssd", "remote")
            and (self._warms or machine.tier(pieces[i].tier).stale)
        ]
        if not left:
            return choice
        self._reading_beside = True
        self._counts["beside"] += 1
        return replace(choice, beside=left[self._counts["beside"] % len(left)])

    def _exploring(self, choice: Choice, times: Mapping[tuple[int, ...], Times]) -> Choice | None:
        """What would be faster than ``choice`` if a kind of prefill not measured lately is better than believed.

        What that may lose is bounded: a part of one prompt in ``STALE_AFTER``.
        """
        machine, work = self.machine, choice.work
        if machine is None or not (machine.dense.scale.stale or machine.sparse.scale.stale):
            return None
        hoped = {loaded: machine.blend(work, [work.pieces[i] for i in loaded], hope=True) for loaded in times}
        hoped[()] = machine.full(work, hope=True)
        tried = min(hoped, key=lambda loaded: hoped[loaded].total)
        if tried == choice.loaded or hoped[tried].total >= choice.times.total * (1 - MARGIN):
            return None
        self._counts["explored"] += 1
        return replace(choice, loaded=tried, times={(): choice.full, **times}[tried], why="tried, to measure it again")


def _splits(machine: Machine, work: Work, blend: Times) -> dict[tuple[int, ...], Times]:
    """What loading some pieces takes, never all and never none: fewer and fewer, and then those next to the best.

    What is dropped first: pieces whose document context is in the prompt (computing the others forgets it), of these
    those on the slowest tier, of these the shortest. Measured rates do not enter here: the order must not flicker.
    """
    order = sorted(
        range(len(work.pieces)),
        key=lambda i: (not work.pieces[i].repairable, _speed(work.pieces[i].tier), work.pieces[i].tokens),
    )
    found: dict[int, tuple[tuple[int, ...], Times]] = {}

    def look(dropped: int) -> Times:
        if dropped not in found:
            loaded = tuple(sorted(order[dropped:]))
            found[dropped] = loaded, machine.blend(work, [work.pieces[i] for i in loaded])
        return found[dropped][1]

    step = -(-len(order) // _SPLITS)
    for dropped in range(step, len(order), step):
        if look(dropped).recompute >= blend.total:  # and those that load less compute for longer yet
            break
    while found and step > 1:
        step = -(-step // 2)
        best = min(found, key=lambda dropped: found[dropped][1].total)
        for dropped in (best - step, best + step):
            if 0 < dropped < len(order):
                look(dropped)
    return dict(found.values())


def _slowest(work: Work, loaded: Sequence[int]) -> str:
    return min((work.pieces[i].tier for i in loaded), key=_speed)


def _speed(tier: str) -> int:
    return {"remote": 0, "ssd": 1, "ram": 2}.get(tier, 3)


def _correct(machine: Machine, choice: Choice, actual: Actual) -> None:
    """Every part of a request corrects the cost it stands for; of a machine that overlaps them, only the total can."""
    work, pieces, layers = choice.work, choice.pieces, machine.layers
    if not pieces:
        spent = max(actual.total - machine.head, _LEAST) / layers
        machine.dense.observe(work.rows, work.pairs, spent)
    elif machine.overlapped:
        _correct_by_total(machine, work, pieces, actual.total)
    else:
        times = machine.blend(work, pieces)
        if nbytes := sum(piece.nbytes for piece in pieces):
            machine.tier("ram").observe(max(actual.load - actual.waited, _LEAST) / nbytes)
        if times.select and actual.select:
            selector = machine.selector(work.strategy)
            selector.observe(selector.value * actual.select / times.select)
        _correct_rows(machine, work, pieces, (actual.recompute - machine.head) / (times.recompute - machine.head))


def _correct_by_total(machine: Machine, work: Work, pieces: Sequence[Piece], total: float) -> None:
    """What the slow tiers' readings, taken in before, do not explain is the chip's doing, or good news of the link."""
    times = machine.blend(work, pieces)
    news = total / times.total
    if news < 1 and times.limit == "ram":
        machine.tier("ram").observe(machine.tier("ram").value * news)
    elif news > 1 or times.limit is None:
        _correct_rows(machine, work, pieces, news)


def _correct_rows(machine: Machine, work: Work, pieces: Sequence[Piece], news: float) -> None:
    main = passes(work, pieces, machine.layers)[-1]
    machine.sparse.observe(main.rows, main.pairs, machine.sparse.seconds(main.rows, main.pairs) * max(news, _LEAST))


def _forecast(choice: Choice, actual: Actual) -> Forecast:
    times = choice.times
    return Forecast(
        way=choice.way,
        why=choice.why,
        full_ms=1000 * choice.full.total,
        blend_ms=1000 * choice.blend.total,
        load_ms=1000 * times.load,
        select_ms=1000 * times.select,
        recompute_ms=1000 * times.recompute,
        total_ms=1000 * times.total,
        actual_load_ms=1000 * actual.load,
        actual_select_ms=1000 * actual.select,
        actual_recompute_ms=1000 * actual.recompute,
        actual_total_ms=1000 * actual.total,
    )


def _why_full(full: Times, best: Times, blend: Times, margin: float) -> str:
    if best.total < full.total:
        times = f"{_ms(best.total)} against {_ms(full.total)} of full prefill"
        return f"loading must win by {margin:.0%}, and is predicted to take {times}"
    slow = max(blend.reading, key=lambda tier: blend.reading[tier])
    parts = [f"{_ms(blend.reading[slow])} of loading from {slow}"]
    parts += [f"{_ms(blend.select)} of selecting"] if blend.select else []
    parts.append(f"{_ms(blend.recompute)} of recomputing")
    return f"full prefill is predicted to be faster: {_ms(full.total)} against {_ms(blend.total)} ({', '.join(parts)})"


def _why_blend(times: Times, full: Times) -> str:
    return f"blending is predicted to be faster: {_ms(times.total)} against {_ms(full.total)} of full prefill"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
