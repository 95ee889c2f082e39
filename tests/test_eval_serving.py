"""Serving measurements: what loads hold, how a run is driven, and what its figures mean."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ragkv.config import load_settings
from ragkv.errors import ConfigError, InputError, NotFoundError, QueueFullError, ServerError
from ragkv.eval import serving_show
from ragkv.eval.cli import app
from ragkv.eval.conversations import Turn, capped, from_trace, invented
from ragkv.eval.priorities import CLASSES, PriorityTrace
from ragkv.eval.serving_drive import Callbacks, Drive, Driver, Life
from ragkv.eval.serving_engine import Prompts, piece_ids
from ragkv.eval.serving_fairness import common, jain_index, largest_gap, merged, services
from ragkv.eval.serving_measures import row_of
from ragkv.eval.serving_plan import ServingPlan
from ragkv.eval.serving_simulated import read_costs
from ragkv.eval.traces import TraceRequest
from ragkv.eval.workloads import LOADS, Ask, Piece, Shape, Workload, bursty, make_workload, on_off
from tests.fake_engine import serving

SHAPE = Shape(requests=60, rate=50.0, prompt_tokens=64, output_tokens=16, context_tokens=400, think_s=0.01)


def _traced(length: int, output: int, *blocks: int, at: float = 0.0) -> TraceRequest:
    return TraceRequest(timestamp=at, input_length=length, output_length=output, hash_ids=list(blocks))


TRACE = [
    _traced(1200, 100, 0, 1, 2),
    _traced(700, 300, 0, 9),
    _traced(1800, 50, 0, 1, 7, 10, at=1000.0),  # goes on with the first: its last block is filled up now
    _traced(1400, 60, 0, 1, 8, at=2000.0),  # another branch of the first
    _traced(2000, 10, 0, 1, 7, 11, at=3000.0),  # goes on with the third
    _traced(900, 10, 0, 5, 6, at=4000.0),  # shares what all share
]


class FakeLoop:
    """One thread gives every request a token a step, up to ``lanes`` of them, the best first; ``full`` refuses all
    behind the first so many."""

    def __init__(self, *, lanes: int = 4, full: int | None = None, stuck: bool = False) -> None:
        self.lanes, self.full, self.stuck = lanes, full, stuck
        self.live: list[SimpleNamespace] = []
        self.priorities: list[tuple[str, int]] = []
        self.steps = self.submitted = 0
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, generation: Any) -> None:
        with self.lock:
            if self.full is not None and self.submitted >= self.full:
                raise QueueFullError("full")
            self.submitted += 1
            self.live.append(generation)

    def reprioritize(self, request_id: str, priority: int, tenant: str = "") -> None:
        self.priorities.append((request_id, priority))
        self._find(request_id).priority = priority

    def cancel(self, request_id: str, tenant: str = "") -> None:
        self._find(request_id).cancelled = True

    def stats(self) -> dict[str, float]:
        names = ("scheduler_seconds", "idle_seconds", "preemptions", "swap_in_bytes", "swap_out_bytes")
        zeros = dict.fromkeys((*names, "prefix_hit_tokens"), 0.0)
        return {**zeros, "steps": self.steps, "step_seconds": 1e-3 * self.steps}

    def _find(self, request_id: str) -> SimpleNamespace:
        with self.lock:
            found = next((one for one in self.live if one.id == request_id), None)
        if found is None:
            raise NotFoundError(request_id)
        return found

    def _run(self) -> None:
        while not self.over.wait(1e-3):
            self.steps += 1
            with self.lock:
                turn = sorted(self.live, key=lambda one: one.priority)
            for one in turn:
                if one.cancelled:
                    self._end(one, "cancelled")
            for one in [] if self.stuck else [one for one in turn if not one.cancelled][: self.lanes]:
                one.callbacks.on_token()
                one.said += 1
                if one.said == one.output:
                    self._end(one, "length")

    def _end(self, one: SimpleNamespace, reason: str) -> None:
        with self.lock:
            self.live.remove(one)
        one.callbacks.on_finish(reason, 10, 0)


@pytest.fixture
def loops() -> Iterator[Any]:
    made: list[FakeLoop] = []

    def make(**options: Any) -> FakeLoop:
        made.append(FakeLoop(**options))
        return made[-1]

    yield make
    for loop in made:
        loop.over.set()
        loop.thread.join()


def _request(ask: Ask, priority: int, callbacks: Callbacks) -> Any:
    """One of the fake loop's."""
    return SimpleNamespace(
        id=str(ask.number), tenant=ask.tenant, priority=priority, output=ask.output, callbacks=callbacks, said=0,
        cancelled=False,
    )  # fmt: skip


def _driven(loop: FakeLoop, workload: Workload, seconds: float = 20.0, **options: Any) -> Drive:
    return Driver(loop, _request, workload, **options).run(seconds)


# Loads.


def test_conversations_are_found_by_what_prompts_share() -> None:
    assert from_trace(TRACE) == [[Turn(1200, 100), Turn(500, 50), Turn(150, 10)]]


def test_conversations_are_cut_where_they_outgrow_the_context() -> None:
    turns = [Turn(100, 10), Turn(20, 50), Turn(500, 10)]
    assert capped(turns, prompt=60, output=30, context=150) == [Turn(60, 10), Turn(20, 30)]


def test_invented_conversations_have_several_turns() -> None:
    turns = [len(one) for one in invented(2000, np.random.default_rng(0))]
    assert min(turns) == 2
    assert np.mean(turns) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name", sorted(LOADS))
def test_every_load_is_seeded_and_within_its_caps(name: str) -> None:
    shape = Shape(requests=60, rate=50.0, prompt_tokens=64, output_tokens=16, context_tokens=400, trace=TRACE)
    workload = make_workload(name, shape)
    assert workload == make_workload(name, shape)
    assert [ask.number for ask in workload.asks] == list(range(len(workload.asks)))
    assert all(0 < ask.new_tokens <= 64 and 0 < ask.output <= 16 for ask in workload.asks)
    assert all(ask.after is None or ask.after < ask.number for ask in workload.asks)


def test_requests_come_at_the_rate_asked_for() -> None:
    shape = Shape(requests=4000, rate=20.0)
    for name in ("poisson", "bursty", "on-off", "tenants-overload"):
        last = max(ask.at for ask in make_workload(name, shape).asks)
        assert last == pytest.approx(200, rel=0.15), name


def test_bursts_are_burstier_than_poisson() -> None:
    assert np.std(gaps := np.diff(bursty(10, 20_000, 0))) / np.mean(gaps) == pytest.approx(3, rel=0.1)
    assert not np.any((on_off(10, 1000, 0) % 10) > 5)


def test_the_honest_tenants_requests_are_the_same_beside_a_flood() -> None:
    shape = Shape(requests=200)
    honest, flooded = (
        [(ask.at, ask.pieces, ask.output) for ask in make_workload(name, shape).asks if ask.tenant == "honest"]
        for name in ("tenants-honest", "tenants-flood")
    )
    assert honest
    assert honest == flooded


def test_loads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="not one of"):
        make_workload("nothing", SHAPE)
    with pytest.raises(ConfigError, match="--trace"):
        make_workload("trace", SHAPE)
    with pytest.raises(ConfigError, match="no room"):
        Shape(prompt_tokens=100, output_tokens=100, context_tokens=150)
    with pytest.raises(ConfigError, match="--preemptions"):
        ServingPlan(preemptions=("none",))  # type: ignore[arg-type]


def test_priorities_are_kept_as_often_as_the_pattern_says() -> None:
    trace, stayed = PriorityTrace("markov", 20_000, 0), 0.8 + 0.2 / CLASSES
    before = trace.now
    assert (trace.advance(1) == before).mean() == pytest.approx(stayed, abs=0.01)
    trace = PriorityTrace("random", 20_000, 0)
    before = trace.now
    assert (trace.advance(1) == before).mean() == pytest.approx(1 / CLASSES, abs=0.01)
    with pytest.raises(ConfigError, match="patterns"):
        PriorityTrace("sometimes", 1, 0)


def test_a_longer_piece_begins_with_the_shorter_one() -> None:
    assert piece_ids(5, 512, 128_256)[:100] == piece_ids(5, 100, 128_256)
    assert piece_ids(5, 100, 128_256) != piece_ids(6, 100, 128_256)


# Driving.


def test_a_turn_comes_after_the_answer(loops: Any) -> None:
    asks = (Ask(0, 0.0, (Piece(1, 5),), 3), Ask(1, 0.02, (Piece(2, 4),), 2, after=0))
    first, second = _driven(loops(), Workload(asks)).lives
    assert first.ended is not None
    assert second.due == pytest.approx(first.ended + 0.02)
    assert second.times[0] >= second.due


def test_a_turns_prompt_is_the_whole_conversation() -> None:
    runner = SimpleNamespace(vocab_size=1000, max_positions=100)
    make, ends = Prompts(load_settings(), SimpleNamespace(runner=runner)), []  # type: ignore[arg-type]
    callbacks = Callbacks(lambda: None, lambda *end: ends.append(end), ends.append)
    first = make(Ask(0, 0.0, (Piece(1, 5),), 3), 0, callbacks)
    for token in range(3):
        first.on_token(token, None)
    second = make(Ask(1, 0.02, (Piece(2, 4), Piece(3, 2)), 2, after=0), 4, callbacks)
    assert list(second.plan.ids) == [*piece_ids(1, 5, 1000), 0, 1, 2, *piece_ids(2, 4, 1000), *piece_ids(3, 2, 1000)]
    assert (second.lineage, second.priority, second.max_tokens) == (first.lineage, 4, 2)
    second.on_finish("length")
    assert ends == [("length", 14, 0)]


def test_everything_is_served(loops: Any) -> None:
    workload = make_workload("sessions", SHAPE)
    drive = _driven(loops(), workload)
    assert Counter(life.fate for life in drive.lives) == {"done": 60}
    assert all(len(life.times) == life.ask.output for life in drive.lives)


def test_priorities_change_with_the_engines_steps(loops: Any) -> None:
    loop = loops(lanes=1)
    workload = make_workload("sessions-random", SHAPE)
    _driven(loop, workload, frequency=0.5)
    names = {name for name, _ in loop.priorities}
    assert len(loop.priorities) > len(names) > 1  # some more than once
    assert {priority for _, priority in loop.priorities} <= set(range(CLASSES))


def test_a_run_that_must_end_counts_who_waits(loops: Any) -> None:
    loop = loops(stuck=True)
    began = time.perf_counter()
    drive = _driven(loop, Workload((Ask(0, 0.0, (Piece(1, 5),), 3), Ask(1, 0.0, (Piece(2, 5),), 3, after=0))), 0.2)
    assert time.perf_counter() - began < 10
    assert [life.fate for life in drive.lives] == ["unfinished"]
    assert not loop.live
    row = row_of(drive, slo_ttft_ms=1000, slo_tbt_ms=50)
    assert row["p99_ttft_ms"] == pytest.approx(200, abs=60)
    assert row["p99_tbt_ms"] is None
    assert row["throughput_tok_s"] == 0.0


def test_a_full_queue_is_counted_and_ends_the_conversation(loops: Any) -> None:
    asks = (
        Ask(0, 0.0, (Piece(1, 5),), 3),
        Ask(1, 0.0, (Piece(2, 5),), 3),
        Ask(2, 0.0, (Piece(2, 5),), 3, after=1),
    )
    drive = _driven(loops(full=1), Workload(asks))
    assert [life.fate for life in drive.lives] == ["done", "refused"]
    assert row_of(drive, slo_ttft_ms=1000, slo_tbt_ms=50)["refused"] == 1


# Figures.


def _life(number: int, due: float, times: Sequence[float], tenant: str = "", weight: float = 1.0, **more: Any) -> Life:
    ask = Ask(number, due, (Piece(number, 10),), len(times), tenant, weight)
    fields = {"times": list(times), "ended": times[-1] if times else None, "fate": "done", **more}
    return Life(ask, due, 10, **fields)


def _drive(*lives: Life, ended: float = 10.0) -> Drive:
    counters = {"steps": 100, "step_seconds": 5.0, "scheduler_seconds": 0.01, "idle_seconds": 4.0, "preemptions": 6,
                "swap_in_bytes": 30, "swap_out_bytes": 50, "prefix_hit_tokens": 5}  # fmt: skip
    return Drive(lives, 0.0, ended, counters)


def test_a_row_of_a_run_counted_by_hand() -> None:
    drive = _drive(_life(0, 0.0, [1.0, 1.5, 2.5]), _life(1, 1.0, [4.0, 4.1]))
    row = row_of(drive, slo_ttft_ms=2000, slo_tbt_ms=800)
    assert row["p50_ttft_ms"] == pytest.approx(2000)
    assert row["p50_tbt_ms"] == pytest.approx(500)
    assert row["throughput_tok_s"] == pytest.approx(0.5)
    assert row["requests_s"] == pytest.approx(0.2)
    assert row["goodput"] == pytest.approx(0.1)
    assert (row["preemption_rate"], row["swap_bytes"], row["idle_share"]) == (3.0, 80, 0.4)
    assert row["scheduler_share"] == pytest.approx(0.002)
    assert row["curves"]["ttft_ms"][0] == 1000
    assert row["jain"] is None
    json.dumps(row, allow_nan=False)


def test_a_token_that_was_waited_for_at_the_end_counts() -> None:
    drive = _drive(_life(0, 0.0, [1.0, 1.1], fate="unfinished"))
    assert row_of(drive, slo_ttft_ms=2000, slo_tbt_ms=800)["p999_tbt_ms"] == pytest.approx(8900, rel=0.01)


def test_intervals_are_merged_and_intersected() -> None:
    assert merged([(3, 4), (0, 1), (0.5, 2), (5, 5)]) == [(0, 2), (3, 4)]
    assert common([(0, 2), (3, 6)], [(1, 4), (5, 7)]) == [(1, 2), (3, 4), (5, 6)]


def test_fair_service_has_an_index_of_one_and_a_small_gap() -> None:
    turn = [_life(n, 0.0, [1.0 + n, 1.5 + n], "ab"[n % 2]) for n in range(20)]
    waiting = [_life(20 + n, 0.0, [], "ab"[n], fate="unfinished", ended=None) for n in range(2)]
    by_tenant = services(_drive(*turn, *waiting, ended=21.0))
    assert jain_index(by_tenant, 21.0) == pytest.approx(1.0)
    assert largest_gap(by_tenant) == pytest.approx(14)  # one request's 10 + 2 · 2


def test_unfair_service_shows_and_weights_count() -> None:
    def lives(weight: float) -> list[Life]:
        served = [_life(n, 0.0, [1.0 + n], "b" if n % 4 == 0 else "a", weight if n % 4 else 1.0) for n in range(40)]
        waiting = [_life(40, 0.0, [], "a", weight, fate="unfinished"), _life(41, 0.0, [], "b", fate="unfinished")]
        return [*served, *waiting]

    unfair, weighted = (services(_drive(*lives(weight), ended=41.0)) for weight in (1.0, 3.0))
    assert jain_index(unfair, 41.0) == pytest.approx((30 + 10) ** 2 / (2 * (30**2 + 10**2)))
    assert jain_index(weighted, 41.0) == pytest.approx(1.0)
    assert (largest_gap(unfair) or 0) > 4 * (largest_gap(weighted) or 0)


def test_who_does_not_wait_is_owed_nothing() -> None:
    by_tenant = services(_drive(_life(0, 0.0, [1.0], "a"), _life(1, 5.0, [6.0], "b")))
    assert largest_gap(by_tenant) is None
    assert jain_index(by_tenant, 10.0) is None


# The whole.

_TINY = (
    "--requests 12 --rate 40 --prompt-tokens 60 --output-tokens 12 --context-tokens 160 --think-s 0.02 --max-running 6 "
    f"--frequency 0.2 --pool-bytes {14 * 294_912}"
).split()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGKV_DATA_DIR", str(tmp_path / "data"))


def test_the_engine_is_measured_and_simulated(tmp_path: Path) -> None:
    saved, picture = tmp_path / "serving.json", tmp_path / "serving.png"
    command = ["serving", "--preemptions", "recompute,reuse", "--simulate", "--out", str(saved), "--plot", str(picture)]
    result = CliRunner().invoke(app, [*command, *_TINY])
    assert result.exit_code == 0, result.output
    content = json.loads(saved.read_text())
    assert {row["preemption"] for row in content["rows"]} == {"recompute", "reuse"}
    for row in content["rows"]:
        assert (row["done"], row["failed"]) == (12, 0)
        assert row["simulated"]["done"] == 12
        assert 0 < row["p50_ttft_ms"] <= row["p999_ttft_ms"]
        assert row["swap_bytes"] == 0 or row["preemption"] == "reuse"
    assert {"command", "date", "gpu", "versions", "costs"} <= content.keys()
    assert picture.stat().st_size > 1000
    assert read_costs(saved).fixed_s == content["costs"]["fixed_s"]
    text = io.StringIO()
    serving_show.show(Console(file=text), content["rows"])
    assert "times as good as recompute" in text.getvalue()


def test_turns_with_retrieved_chunks_are_served() -> None:
    options = ["--load", "sessions-rag", "--requests", "4", "--chunks", "2", "--chunk-tokens", "32", "--pool", "4"]
    command = ["serving", "--preemptions", "reuse", *_TINY, *options, "--pool-bytes", "20000000", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout)
    assert (row["done"], row["failed"]) == (4, 0)


def test_several_numbers_of_running_requests_are_runs_of_their_own() -> None:
    command = ["serving", "--load", "poisson", "--preemptions", "reuse", *_TINY]
    command += ["--requests", "4", "--max-running", "6,1", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    many, single = json.loads(result.stdout)
    assert (many["max_running"], single["max_running"]) == (6, 1)
    assert single["steps"] > many["steps"]


_TENANTS = """
api_key = "the-operators-key"
[tenants.one]
key = "the-key-of-one"
[tenants.two]
key = "the-key-of-two"
weight = 2.0
"""


@pytest.fixture
def server(make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    Path("ragkv.toml").write_text(_TENANTS)
    with serving(make_engine(model="bundled", port=0, scheduler="vtc", max_running=4, max_queued=9)) as url:
        yield url


def _at(url: str, load: str, *options: str) -> Any:
    command = ["serving", "--url", url, "--load", load, "--requests", "8", "--rate", "100", "--prompt-tokens", "30"]
    command += ["--output-tokens", "6", "--context-tokens", "400", "--think-s", "0.01", "--frequency", "0.5"]
    return CliRunner().invoke(app, [*command, *options])


def test_a_running_server_is_measured_through_its_api(server: str) -> None:
    loads = "sessions-priority,sessions-rag,tenants-weights"
    result = _at(server, loads, "--chunks", "2", "--chunk-tokens", "40", "--pool", "4", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["load"] for row in rows] == loads.split(",")
    for row in rows:
        assert (row["done"], row["failed"], row["model"]) == (8, 0, "bundled")
        assert 0 < row["p50_ttft_ms"] <= row["p999_ttft_ms"]
        assert row["steps"] > 0
        assert 0 <= row["idle_share"] <= 1
    assert rows[0]["prefix_hit_share"] > 0
    assert min(own["service"] for own in rows[2]["tenants"].values()) > 4 * 6 * 2
    table = _at(server, "poisson")
    assert "p99.9" in table.stdout


def test_a_flooded_server_refuses_and_that_is_counted(server: str) -> None:
    result = _at(server, "poisson", "--requests", "40", "--rate", "10000", "--json")
    [row] = json.loads(result.stdout)
    assert row["refused"] > 0
    assert row["done"] + row["refused"] == 40


def test_a_server_that_cannot_be_measured_says_why(server: str) -> None:
    assert "tenants.honest" in str(_at(server, "tenants-honest").exception)
    assert "--policies does not go with --url" in str(_at(server, "poisson", "--policies", "vtc").exception)
    assert isinstance(_at("http://127.0.0.1:9", "poisson").exception, ServerError)


def test_what_is_cancelled_at_the_server_is_unfinished(server: str) -> None:
    result = _at(server, "poisson", "--output-tokens", "300", "--context-tokens", "900", "--budget-s", "1", "--json")
    [row] = json.loads(result.stdout)
    assert row["unfinished"] > 0
    assert row["failed"] == 0


def test_the_report_shows_runs_beside_recomputing(tmp_path: Path) -> None:
    drive = _drive(_life(0, 0.0, [1.0, 1.5, 2.5], "<i>"), _life(1, 1.0, [4.0, 4.1], "z", 2.0))
    row = {"load": "<b>", "policy": "vtc", "preemption": "recompute", **row_of(drive, slo_ttft_ms=1, slo_tbt_ms=1)}
    better = {**row, "preemption": "reuse", "p99_ttft_ms": row["p99_ttft_ms"] / 4, "jain": 0.987}
    (tmp_path / "serving.json").write_text(json.dumps({"model": "m", "device": "d", "rows": [row, better]}))
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "serving.json"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    html = page.read_text()
    assert 'id="serving"' in html
    assert "4.00 times as good as recompute" in html
    assert "0.987" in html
    assert "&lt;i&gt;" in html
    assert "<i>" not in html
    assert "1 requests, served 14" in html  # of z, whose weight does not count here
    assert html.count(">0.100<") == 2  # ms of scheduling a step
    assert "<b>" not in html.replace("<b>serving.json", "")
    (tmp_path / "serving.json").write_text(json.dumps({"rows": [{**row, "throughput_tok_s": "fast"}]}))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "serving.json"), "--out", str(page)])
    assert "throughput_tok_s" in str(result.exception)


def test_a_pool_without_room_for_a_conversation_is_refused() -> None:
    result = CliRunner().invoke(app, ["serving", *_TINY, "--context-tokens", "4000"])
    assert isinstance(result.exception, InputError)
    assert "--pool-bytes" in str(result.exception)


def test_costs_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="no step costs"):
        read_costs(tmp_path / "costs.json")
