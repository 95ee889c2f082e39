"""Prefills under way: the best is advanced layer by layer, others along with it where that is sooner for all.

Who goes along stands before the same layer. Before its first one the best prefill waits until those behind it stand
there too, if it pays to run layers for them as well (:mod:`ragkv.joining`); from then on they stay in step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ragkv.active import Active, Phase
from ragkv.controller import Controller
from ragkv.costs import Machine
from ragkv.joining import Load, pays
from ragkv.prefill import Prefill, PrefillResult
from ragkv.rows import Joined, Rows
from ragkv.runner import ModelRunner
from ragkv.steps import LayerCall, Steps, run_calls

log = logging.getLogger("ragkv")


@dataclass(eq=False)
class _UnderWay:
    """One prefill.

    Attributes:
        call: what it wants run next; None before it stands before a layer, while it selects, and when that was run.
        alone: it joins nobody.
        begun: it has stood before a layer; it took ``prepared_s`` seconds to get there.
        waits: seconds from the end of each of the last two layers until it wanted the next.
    """

    request: Active
    prefill: Prefill
    steps: Steps[PrefillResult]
    call: LayerCall | None = None
    alone: bool = False
    begun: bool = False
    prepared_s: float = 0.0
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=2))

    def go_on(self) -> None:
        """Do what it does by itself, until it wants a layer run, others may be served, or it is through."""
        began = time.perf_counter()
        self.call = next(self.steps)
        if self.begun:
            self.waits.append(time.perf_counter() - began)
        else:
            self.prepared_s += time.perf_counter() - began
        self.begun |= self.call is not None

    def begin_again(self) -> None:
        self.steps.close()
        self.steps, self.call, self.alone = self.prefill.steps(), None, True

    def load(self) -> Load:
        """Of the layer that it wants run."""
        step = self.wanted.rows.step
        # One long wait is a hiccup, or what comes between two passes.
        return Load(step.rows, _pairs(step.rows, step.length), min(self.waits) if len(self.waits) == 2 else 0.0)

    @property
    def wanted(self) -> LayerCall:
        if self.call is None:
            raise RuntimeError("it does not stand before a layer")
        return self.call

    def least_load(self, layers: int) -> Load:
        """Before it has begun, by what it must compute; its wait is what it has cost the others so far."""
        rows = self.prefill.least_rows
        return Load(rows, _pairs(rows, len(self.request.ids)), self.prepared_s / layers)


class Prefills:
    """The requests that are in their prefill.

    Args:
        controller: knows what layers take; nobody joins before it does, or without one.
        stood: called with a request, which has left, and what came of its prefill.
        failed: called with a request and the error that ended it; it must have it leave.

    Attributes:
        joined_layers: layers of single prompts that were run along with another's.
    """

    def __init__(
        self,
        runner: ModelRunner,
        controller: Controller | None,
        stood: Callable[[Active, PrefillResult], None],
        failed: Callable[[Active, Exception], None],
    ) -> None:
        self._runner, self._controller = runner, controller
        self._stood, self._failed = stood, failed
        self._under_way: list[_UnderWay] = []
        self._ran: list[_UnderWay] = []  # in the last step; they have not gone on since
        self._joined: Joined | None = None
        self._mark, self._waiting = 0.0, 0
        self.joined_layers = 0

    @property
    def requests(self) -> list[Active]:
        """The best first."""
        return [one.request for one in self._under_way]

    def enter(self, request: Active, prefill: Prefill) -> None:
        request.phase, request.prefill_s = Phase.PREFILL, 0.0
        self._under_way.append(_UnderWay(request, prefill, prefill.steps()))

    def leave(self, request: Active) -> None:
        """Whatever it holds is let go of, wherever it stands."""
        for one in self._under_way:
            if one.request is request:
                self._remove(one)
                one.steps.close()
                return

    def begin(self, turn: Sequence[Active], waiting: int) -> None:
        """A slice of time begins; requests take turns as in ``turn``, and so many wait to be started."""
        order = {id(request): at for at, request in enumerate(turn)}
        self._under_way.sort(key=lambda one: order[id(one.request)])
        self._mark, self._waiting = time.perf_counter(), waiting

    def end(self) -> None:
        """The slice ends: the time until the next is nobody's."""
        if self._under_way:
            self._spend(self._under_way[0].request)

    def seconds(self, request: Active) -> float | None:
        """What its prefill has taken so far; None where that was not its own time alone."""
        spent = request.prefill_s
        return None if spent is None else spent + time.perf_counter() - self._mark

    def step(self) -> float:
        """Advance the best, by a layer where it computes, and who goes along. Returns about how many tokens of prompts
        that was."""
        ran, self._ran = self._ran, []
        for one in ran:
            if one in self._under_way:
                self._go_on(one)
        moved: list[_UnderWay] = []
        if self._under_way and all(one in self._under_way for one in ran):  # else a first token is to be delivered
            lead = self._under_way[0]
            if ran and ran != [lead]:
                lead.request.prefill_s = None
            moved = self._advance(lead)
            self._spend(lead.request)
        self._mark = time.perf_counter()
        return sum(_tokens(one.request) for one in moved) / self._runner.shape.layers

    def _advance(self, lead: _UnderWay) -> list[_UnderWay]:
        """Returns who has been."""
        if lead.call is None:
            self._go_on(lead)
            if lead.call is None:
                return [lead]
        group = self._group(lead)
        if (other := self._expected(group)) is not None:
            lead.request.prefill_s = None
            self._go_on(other)
            return [other]
        self._run(group)
        return group

    def _go_on(self, one: _UnderWay) -> None:
        try:
            one.go_on()
        except StopIteration as done:
            self._end(one, done.value)
        except Exception as error:  # one request's failure must not take the others along
            self._failed(one.request, error)

    def _end(self, one: _UnderWay, result: PrefillResult) -> None:
        self._remove(one)
        try:
            self._stood(one.request, result)
        except Exception as error:  # as above
            self._failed(one.request, error)

    def _remove(self, one: _UnderWay) -> None:
        self._under_way.remove(one)
        if one in self._ran:
            self._ran.remove(one)
        self._joined = None  # it holds the request's KV

    # Who goes along.

    @property
    def _machine(self) -> Machine | None:
        return None if self._controller is None else self._controller.machine

    def _group(self, lead: _UnderWay) -> list[_UnderWay]:
        """``lead``, and those that join it in the layer that it wants."""
        machine, group = self._machine, [lead]
        for other in self._others(lead):
            if machine is None or other.call is None or other.call.layer != lead.wanted.layer:
                continue
            if pays(machine, [one.load() for one in group], other.load(), self._behind(group)):
                group.append(other)
        return group

    def _expected(self, group: list[_UnderWay]) -> _UnderWay | None:
        """Who has not begun, as ``group`` hardly has, and would probably join it."""
        machine, lead = self._machine, group[0]
        if machine is None or lead.wanted.layer != 0:
            return None
        for other in self._others(lead):
            least = other.least_load(machine.layers)
            if not other.begun and pays(machine, [one.load() for one in group], least, self._behind(group)):
                return other
        return None

    def _behind(self, group: list[_UnderWay]) -> int:
        """How many wait for ``group`` and one more."""
        return len(self._under_way) - len(group) - 1 + self._waiting

    def _others(self, lead: _UnderWay) -> list[_UnderWay]:
        return [] if lead.alone else [other for other in self._under_way[1:] if not other.alone]

    def _run(self, group: list[_UnderWay]) -> None:
        calls = [one.wanted for one in group]
        try:
            run_calls(self._runner, calls, self._side_by_side([call.rows for call in calls]))
        except Exception as error:  # as above
            self._blame(group, error)
            return
        self._ran = group
        for one in group:
            one.call = None
            if len(group) > 1:
                one.request.prefill_s = None
                self.joined_layers += 1

    def _blame(self, group: list[_UnderWay], error: Exception) -> None:
        """After a layer that failed. Of several nobody knows who is to blame, nor how far they came: each begins again,
        by itself."""
        if len(group) == 1:
            self._failed(group[0].request, error)
            return
        log.warning("computing %d prompts together failed, each goes on by itself: %r", len(group), error)
        self._joined = None
        for one in group:
            one.begin_again()

    def _side_by_side(self, rows: list[Rows]) -> Joined | None:
        if len(rows) == 1:
            return None
        if self._joined is None or not self._joined.holds(rows):
            self._joined = Joined(rows)
        return self._joined

    def _spend(self, request: Active) -> None:
        if request.prefill_s is not None:
            request.prefill_s += time.perf_counter() - self._mark


def _pairs(rows: int, length: int) -> float:
    """About how many keys rows all over a prompt look at."""
    return rows * length / 2


def _tokens(request: Active) -> int:
    return len(request.ids) - (request.table.tokens if request.table is not None else 0)
