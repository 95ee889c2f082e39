"""Prefills under way: who is advanced, who goes along, and what each comes to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from ragkv import loop, prefills
from ragkv.clock import Stopwatch
from ragkv.controller import Controller
from ragkv.lineage import Lineage
from ragkv.move_costs import MoveCosts
from ragkv.plan import PromptPlan
from ragkv.prefills import Prefills
from ragkv.rows import Joined, Rows
from ragkv.runner import ModelRunner
from ragkv.steps import LayerCall
from tests import fused_kit
from tests.blend_kit import Desk, token_ids
from tests.families import make_runner
from tests.serving_kit import PATIENCE_S, Asked, Hall, alone, hall, machine

LAYERS = 4
LENGTHS = (61, 33, 90, 5)


@pytest.fixture(autouse=True)
def _all_may_start(monkeypatch):
    monkeypatch.setattr(loop, "PREFILLS", 9)


class Log:
    """What was run: for each run the rows of every prompt in it. ``before`` may hold a run up or have it fail."""

    def __init__(self, runner: ModelRunner, before: Callable[[int, list[Rows]], None] = lambda *_: None) -> None:
        self.runs: list[tuple[int, list[int]]] = []
        run_layer, run_together = runner.run_layer, runner.run_together

        def one(layer: int, rows: Rows) -> None:
            before(layer, [rows])
            run_layer(layer, rows)
            self.runs.append((layer, [rows.step.rows]))

        def several(layer: int, joined: Joined) -> None:
            before(layer, joined._members)
            run_together(layer, joined)
            self.runs.append((layer, [step.rows for step in joined.step.steps]))

        runner.run_layer, runner.run_together = one, several  # type: ignore[method-assign]


def together(place: Hall, prompts: Sequence[Sequence[int]], max_tokens: int = 6, **fields: object) -> list[Asked]:
    """Asked for while the loop cannot look."""
    with place.loop._wake:
        return [place.ask(prompt, max_tokens, **fields) for prompt in prompts]


def prompts_of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    return [token_ids(length, seed=length) for length in lengths]


@pytest.mark.parametrize(
    "family", ["llama", "mistral-windowed", "qwen2-windowed", "phi3-partial", "olmo2", "smollm3-windowed"]
)
def test_prompts_computed_together_are_answered_as_each_alone(tmp_path, family):
    runner, prompts = make_runner(family), prompts_of(LENGTHS)
    expected = [alone(runner, prompt, 6) for prompt in prompts]
    log = Log(runner)
    with hall(tmp_path, runner=runner, machine=machine()) as place:
        asked = [one.wait() for one in together(place, prompts)]
        assert [one.tokens for one in asked] == expected
        assert log.runs == [(layer, list(LENGTHS)) for layer in range(LAYERS)]
        assert place.loop.stats()["joined_layers"] == LAYERS * len(prompts)
        place.check()


def plans_of(desk: Desk) -> list[PromptPlan]:
    """Prompts of several lengths, with chunks that are stored and one that is not."""
    documents = [desk.document(name, *lengths) for name, lengths in (("a", (20, 13)), ("b", (31,)), ("c", (17, 9, 4)))]
    desk.put(*(chunk for chunks in documents[:2] for chunk in chunks), *documents[2][:2])
    a, b, c = documents
    return [desk.plan(*a), desk.plan(*b, *a, question=14), desk.plan(*c, question=3), desk.plan(*c[:2], *b)]


@pytest.mark.parametrize("family", ["llama", "smollm3-windowed"])
@pytest.mark.parametrize("strategies", [("epic",), ("question",), ("links",), ("hkvd",), ("hkvd", "links", "question")])
def test_blends_computed_together_are_answered_as_each_alone(tmp_path, family, strategies):
    desk = Desk(tmp_path, family)
    plans = plans_of(desk)
    ways = [{"strategy": strategies[i % len(strategies)], "ratio": 0.3} for i in range(len(plans))]

    def ask(place: Hall) -> list[Asked]:
        with place.loop._wake:
            each = zip(plans, ways, strict=True)
            return [place.ask(plan, 6, lineage=Lineage(bytes([i])), **way) for i, (plan, way) in enumerate(each)]

    with hall(tmp_path, runner=desk.runner, store=desk.store) as place:
        expected = [one.wait().tokens for one in ask(place)]
        assert place.loop.stats()["joined_layers"] == 0
    with hall(tmp_path, runner=desk.runner, store=desk.store, machine=machine()) as place:
        asked = [one.wait() for one in ask(place)]
        assert [one.tokens for one in asked] == expected
        everywhere = LAYERS * len(plans) if len(strategies) == 1 else 1  # passes of several kinds are not in step
        assert place.loop.stats()["joined_layers"] >= everywhere
        place.check()
    parts = [one.generation.watch.parts for one in asked]
    assert all(part["recompute"] > 0 and part["load"] > 0 for part in parts)
    desk.store.close()


@pytest.mark.parametrize("costs", [None, machine((1, 0.001), (4096, 4.096))])
def test_nobody_joins_before_it_is_known_or_where_it_saves_nothing(tmp_path, costs):
    runner = make_runner("llama")
    log = Log(runner)
    with hall(tmp_path, runner=runner, machine=costs) as place:
        for one in together(place, prompts_of((30, 20))):
            one.wait()
    assert log.runs == [(layer, [length]) for length in (30, 20) for layer in range(LAYERS)]


def test_few_rows_do_not_wait_for_many(tmp_path):
    """Nor are the many opened before it is their turn."""
    runner = make_runner("llama")
    log = Log(runner)
    opened: list[int] = []
    workspace = runner.workspace
    runner.workspace = lambda capacity: opened.append(len(log.runs)) or workspace(capacity)
    with hall(tmp_path, runner=runner, machine=machine((40, 1.0), (80, 3.0))) as place:
        for one in together(place, prompts_of((10, 100, 12))):
            one.wait()
    few = [(layer, [10, 12]) for layer in range(LAYERS)]
    assert log.runs == [*few, *((layer, [100]) for layer in range(LAYERS))]
    assert opened == [0, 0, LAYERS]


@pytest.mark.parametrize("requests", [2, 9])
def test_the_more_wait_the_more_counts_that_all_takes_less(tmp_path, requests):
    """As one 1.7 s a layer, one after the other 1 s and 2 s."""
    runner = make_runner("llama")
    log = Log(runner)
    with hall(tmp_path, runner=runner, machine=machine((6, 1.0), (60, 10.0)), max_running=2) as place:
        for one in together(place, [token_ids(5, seed=i) for i in range(requests)]):
            one.wait()
    assert log.runs[0] == (0, [5, 5] if requests > 2 else [5])


class FaultError(RuntimeError):
    pass


def test_of_prompts_that_fail_together_only_the_one_to_blame_ends(tmp_path, caplog):
    runner, prompts = make_runner("llama"), prompts_of(LENGTHS[:3])
    expected = [alone(runner, prompt, 6) for prompt in prompts]

    def refuse(layer: int, several: list[Rows]) -> None:
        if layer == 2 and any(rows.step.rows == LENGTHS[1] for rows in several):
            raise FaultError("no layer")

    log = Log(runner, refuse)
    with hall(tmp_path, runner=runner, machine=machine()) as place:
        first, victim, last = (one.wait() for one in together(place, prompts))
        assert [first.tokens, last.tokens] == [expected[0], expected[2]]
        assert isinstance(victim.ends[0], FaultError)
        assert "each goes on by itself" in caplog.text
        assert all(len(rows) == 1 for _, rows in log.runs[2:])
        assert place.ask(prompts[0], 6).wait().tokens == expected[0]
        place.check()


class Gate:
    """Holds the loop before ``layer`` of a joined run, once."""

    def __init__(self, layer: int) -> None:
        self._layer, self.reached, self.open = layer, threading.Event(), threading.Event()

    def __call__(self, layer: int, several: list[Rows]) -> None:
        if layer == self._layer and len(several) > 1 and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(PATIENCE_S)


@pytest.mark.parametrize("who", range(3))
def test_one_is_cancelled_among_those_computed_together(tmp_path, who):
    runner, prompts = make_runner("qwen3"), prompts_of(LENGTHS[:3])
    expected = [alone(runner, prompt, 6) for prompt in prompts]
    gate = Gate(1)
    log = Log(runner, gate)
    with hall(tmp_path, runner=runner, machine=machine()) as place:
        asked = together(place, prompts)
        assert gate.reached.wait(PATIENCE_S)
        asked[who].generation.stop.set()
        gate.open.set()
        others = [i for i in range(3) if i != who]
        assert [asked[i].wait().tokens for i in others] == [expected[i] for i in others]
        assert asked[who].wait().ends == ["cancelled"]
        assert log.runs[2:] == [(layer, [LENGTHS[i] for i in others]) for layer in (2, 3)]
        place.check()


def test_one_is_preempted_among_those_computed_together(tmp_path):
    runner, prompts = make_runner("llama"), prompts_of((60, 50, 70))
    expected = [alone(runner, prompt, 6) for prompt in prompts]
    gate = Gate(2)
    log = Log(runner, gate)
    with hall(tmp_path, runner=runner, machine=machine(), blocks=9, policy="priority") as place:
        asked = together(place, prompts[:2], priority=5)
        assert gate.reached.wait(PATIENCE_S)
        asked.append(place.ask(prompts[2], 6, priority=0))
        gate.open.set()
        assert [one.wait().tokens for one in asked] == expected
        assert place.loop.stats()["preemptions"] > 0
        assert (2, [60, 50]) in log.runs
        assert (3, [60, 50]) not in log.runs
        place.check()


def test_what_was_computed_together_says_nothing_of_what_one_takes(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(MoveCosts, "computed", lambda self, tokens, seconds: told.append(tokens))
    with hall(tmp_path, machine=machine()) as place:
        for one in together(place, prompts_of((61, 33))):
            one.wait()
        assert told == []
        place.ask(token_ids(40, seed=1)).wait()
    assert told == [40]


# Step by step


class Scripted:
    """A prefill that runs ``layers`` over ``rows``, and does ``own`` by itself before each."""

    def __init__(self, runner: ModelRunner, rows: int, own: Callable[[int], None] = lambda _: None, selects: int = 0):
        self._runner, self.least_rows, self._own, self._selects = runner, rows, own, selects

    def steps(self):
        rows = fused_kit.prompt(self._runner, self.least_rows, seed=1)
        for _ in range(self._selects):
            self._own(-1)
            yield None
        for layer in range(LAYERS):
            self._own(layer)
            yield LayerCall(layer, rows, Stopwatch(), "recompute")
        return None


class Request:
    """What of a request is needed here."""

    def __init__(self, length: int) -> None:
        self.ids, self.table, self.phase, self.prefill_s = [0] * length, None, None, None


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(prefills.time, "perf_counter", lambda: now[0])
    return now


class Desktop:
    """Prefills, and what was run for them; rows tell requests apart."""

    def __init__(self, costs) -> None:
        self.runner = make_runner("llama")
        self.log = Log(self.runner)
        self.ended: list[int] = []
        self.prefills = Prefills(
            self.runner, Controller(costs), lambda request, _: self.ended.append(len(request.ids)), self._fail
        )

    def _fail(self, request, error):
        raise error

    def enter(self, rows: int, **script) -> None:
        self.prefills.enter(Request(rows), Scripted(self.runner, rows, **script))

    @torch.inference_mode()
    def run(self, steps: int = 1000) -> list[tuple[int, list[int]]]:
        self.prefills.begin(self.prefills.requests, waiting=0)
        for _ in range(steps):
            if self.prefills.requests:
                self.prefills.step()
        return self.log.runs


def test_one_whose_kv_comes_late_falls_behind(clock):
    """At once where it is late every time, never for one hiccup."""

    def late(layers):
        def wait(layer):
            clock[0] += 2.5 if layer in layers else 0.0

        return wait

    desk = Desktop(machine((1000, 1.0)))
    desk.enter(9)
    desk.enter(7, own=late({1, 2, 3}))
    assert desk.run() == [(0, [9, 7]), (1, [9, 7]), (2, [9]), (3, [9]), (2, [7]), (3, [7])]
    desk = Desktop(machine((1000, 1.0)))
    desk.enter(9)
    desk.enter(7, own=late({2}))
    assert desk.run() == [(layer, [9, 7]) for layer in range(LAYERS)]


def test_who_takes_long_to_select_is_not_waited_for(clock):
    def select(layer):
        clock[0] += 1.5

    costs = machine((1000, 1.0))
    desk = Desktop(costs)
    desk.enter(9)
    desk.enter(7, own=select, selects=3)
    assert desk.run(LAYERS)[0] == (0, [9])
    desk = Desktop(costs)
    desk.enter(9)
    desk.enter(7, selects=3)
    assert desk.run() == [(layer, [9, 7]) for layer in range(LAYERS)]


def test_the_better_go_first_from_their_first_layer_on(clock):
    desk = Desktop(machine((1000, 1.0)))
    desk.enter(9)
    desk.run(2)
    desk.enter(7)
    desk.enter(5)
    desk.run(1)
    first, second, third = desk.prefills.requests
    desk.prefills.begin([second, first, third], waiting=0)
    desk.run()
    assert desk.log.runs == [
        *[(layer, [9]) for layer in range(3)],
        *[(layer, [7, 5]) for layer in range(3)],
        (3, [7, 9, 5]),  # whom they have caught up with
    ]
    assert desk.ended == [7, 9, 5]


def test_who_leaves_is_held_by_nobody(clock):
    desk = Desktop(machine((1000, 1.0)))
    new_kv, made = desk.runner.new_kv, []

    def watched(*args):
        kv = new_kv(*args)
        made.append(weakref.ref(kv))
        return kv

    desk.runner.new_kv = watched
    desk.enter(9)
    desk.enter(7)
    desk.run(3)
    assert desk.log.runs == [(0, [9, 7]), (1, [9, 7])]
    desk.prefills.leave(desk.prefills.requests[0])
    assert [ref() is None for ref in made] == [True, False]
    assert desk.run()[2:] == [(2, [7]), (3, [7])]
    assert [ref() is None for ref in made] == [True, True]
