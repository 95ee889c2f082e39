"""The controller inside a prefill, and inside an engine: what is computed by choice, and what is said of it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from ragkv.controller import Controller
from ragkv.costs import Curve, Estimate, Machine, Work
from ragkv.machine import measure_machine
from ragkv.types import Answer
from tests.blend_kit import Desk, close, drain
from tests.engine_kit import DOCUMENTS, QUESTION, Probe, eventually, wait_idle
from tests.store_kit import flip

LAYERS = 4


def machine(*, ssd: float = 1e-12, ram: float = 1e-12) -> Machine:
    """Costs so plain that the choice is known: seconds per byte, and a microsecond per row and layer."""
    tiers = {"ram": Estimate(ram), "ssd": Estimate(ssd)}
    return Machine(LAYERS, Curve([(1, 1e-6)], 0.0), Curve([(1, 1e-6)], 0.0), 0.0, tiers)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


def stored(desk, *lengths):
    chunks = desk.document("d", *lengths)
    desk.put(*chunks)
    return chunks


def test_a_slow_disk_makes_it_a_full_prefill_that_says_why(desk):
    chunks = stored(desk, 23, 18)
    plan = desk.plan(*chunks)
    result = desk.run(plan, "question", 0.2, controller=Controller(machine(ssd=1.0)))
    forecast = result.learn()
    close(result.logits, desk.library(plan))
    assert [(o.kv, o.token_layers) for o in result.outcomes] == [("computed", 92), ("computed", 72)]
    assert {o.why for o in result.outcomes} == {forecast.why}
    assert forecast.why.startswith("full prefill is predicted to be faster: ")
    assert forecast.way == "full"
    assert result.to_encode == []
    assert all(desk.free(chunk) for chunk in chunks)


def test_a_fast_disk_makes_it_the_blend_that_was_asked_for(desk):
    chunks = stored(desk, 23, 18)
    plan = desk.plan(*chunks)
    asked = desk.run(plan, "question", 0.2)
    result = desk.run(plan, "question", 0.2, controller=Controller(machine()))
    forecast = result.learn()
    assert forecast.way == "blend"
    assert [vars(o) for o in result.outcomes] == [vars(o) for o in asked.outcomes]
    close(result.logits, asked.logits)


def test_what_is_made_of_the_logits_is_no_part_of_what_is_learnt(desk):
    plan, started = desk.plan(*stored(desk, 23, 18)), time.perf_counter()
    result = desk.run(plan, "question", 0.2, controller=Controller(machine()))
    took = time.perf_counter() - started
    time.sleep(2 * took)  # somebody chooses a token
    assert result.learn().actual_total_ms <= 1000 * took


def test_chunks_computed_by_choice_are_neither_missing_nor_encoded_again(desk, monkeypatch):
    first, second, third, missing = desk.document("d", 40, 20, 40, 11)
    desk.put(first, second, third)
    plan = desk.plan(first, second, third, missing)
    controller = Controller(machine())
    choose = controller.choose

    def all_but_the_second(work):
        choice = choose(work)
        return type(choice)(choice.work, (0, 2), choice.times, choice.full, choice.blend, "for the test")

    monkeypatch.setattr(controller, "choose", all_but_the_second)
    result = desk.run(plan, "epic", 0.2, controller=controller)
    forecast = result.learn()
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["ssd", "computed", "ssd", "computed"]
    assert result.outcomes[1].why == "computed: faster than loading it from ssd"
    assert result.outcomes[3].why == "not stored yet"
    assert [span.chunk for span in result.to_encode] == [missing]
    assert forecast.way == "split"
    # The configured share is repaired of what was loaded.
    assert sum(o.repaired_tokens for o in result.outcomes if o.kv == "ssd") == round(0.2 * 80)
    assert all(desk.free(chunk) for chunk in (first, second, third))


def test_what_is_not_loaded_is_free_while_it_is_computed(desk):
    chunks = stored(desk, 23, 18)
    steps = desk.prefill(desk.plan(*chunks), "none", controller=Controller(machine(ssd=1.0))).run()
    with torch.inference_mode():
        next(steps)
        assert all(desk.free(chunk) for chunk in chunks)
        steps.close()


def test_nothing_is_chosen_without_a_controller_before_it_is_ready_or_for_what_is_not_stored(desk):
    chunks = stored(desk, 23)
    plan = desk.plan(*chunks)
    assert desk.run(plan, "none").learn() is None
    assert desk.run(plan, "none", controller=Controller()).learn() is None
    assert desk.run(desk.plan(*desk.document("e", 18)), "none", controller=Controller(machine())).learn() is None
    assert desk.run(plan, "full", controller=Controller(machine())).learn() is None


def test_a_damaged_chunk_is_chosen_about_anew(desk):
    chunks = stored(desk, 23, 18, 11)
    [entry] = desk.store.open([chunks[1].tokens.key])
    with entry:
        flip(Path(desk.store.folder.entry_path(entry.key)), entry.header.slabs[2].offset * 8 + 99)
    plan = desk.plan(*chunks)
    result = desk.run(plan, "none", controller=Controller(machine()))
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["ssd", "computed", "ssd"]
    assert "unreadable" in result.outcomes[1].why
    assert [span.chunk for span in result.to_encode] == [chunks[1]]


def test_a_prefill_teaches_the_controller(desk):
    chunks = stored(desk, 23, 18)
    controller = Controller(machine())
    controller.machine.tiers["ssd"] = Estimate(1e-12, guessed=True)
    result = desk.run(desk.plan(*chunks), "question", 0.2, controller=controller)
    forecast = result.learn()
    assert forecast.actual_total_ms > forecast.actual_load_ms > 0
    stats = controller.stats()
    assert stats["controller_ssd_bytes_per_second"] < 1e11
    assert stats["controller_error"] > 0


def test_what_is_not_loaded_is_read_beside_and_is_in_ram_next_time(tmp_path):
    desk = Desk(tmp_path, ram_bytes=2**24)
    chunks = stored(desk, 23, 18)
    plan = desk.plan(*chunks)
    controller = Controller(machine(ssd=1.0), warms=True)
    for way in ("full", "split"):
        assert desk.run(plan, "none", controller=controller).learn().way == way
        eventually(lambda: not any(t.name == "ragkv-beside" for t in threading.enumerate()))
    assert {one.tier for one in desk.store.lookup([chunk.tokens.key for chunk in chunks])} == {"ram"}
    assert [o.kv for o in desk.run(plan, "none", controller=controller).outcomes] == ["ram", "ram"]
    assert all(desk.free(chunk) for chunk in chunks)
    desk.store.close()


def test_a_machine_is_measured_step_by_step_and_costs_what_more_rows_cost(desk):
    measured = drain(measure_machine(desk.runner))
    assert measured.full(Work(400, (), "none", 0.0)).total > measured.full(Work(16, (), "none", 0.0)).total > 0
    assert measured.tier("ram").value > 0
    assert measured.together > 0
    assert not measured.overlapped


@pytest.fixture
def choosing(make_engine):
    engine = make_engine(controller="on")
    eventually(lambda: engine._loop._measuring is None)
    engine._controller.machine = machine(ssd=1e3, ram=1e3)
    engine.ingest("c", DOCUMENTS)
    return engine


def test_an_engine_chooses_and_reports(choosing):
    answer = choosing.query(QUESTION, collection="c")
    assert {c.kv for c in answer.sources} == {"computed"}
    assert answer.forecast.way == "full"
    assert answer.recomputed_share == 1.0
    assert answer.forecast.actual_total_ms <= answer.timing.ttft_ms
    assert Answer.model_validate(json.loads(answer.model_dump_json())).forecast == answer.forecast
    metrics = choosing.metrics()
    assert metrics["controller_full"] == 1
    assert metrics["controller_chunks_computed"] == len(answer.sources)
    wait_idle(choosing)
    assert choosing.health().encoding == 0


def test_a_request_that_names_a_method_gets_that_one(choosing):
    answer = choosing.query(QUESTION, collection="c", method="question")
    assert {c.kv for c in answer.sources} <= {"ssd", "ram"}
    assert answer.forecast is None
    assert choosing.query(QUESTION, collection="c", method="default").forecast is not None


def test_an_engine_whose_controller_is_off_measures_nothing(engine):
    engine.ingest("c", DOCUMENTS)
    assert engine.query(QUESTION, collection="c").forecast is None
    assert not [name for name in engine.metrics() if name.startswith("controller")]


def test_requests_come_before_measuring(make_engine, monkeypatch):
    engine = make_engine(controller="on")
    eventually(lambda: engine._loop._measuring is None)

    def never():
        while True:
            yield

    probe = Probe(engine)
    engine._loop._measuring = never()
    assert engine.query(QUESTION, max_tokens=4).usage.completion_tokens == 4
    assert probe.layers
    engine._loop._measuring = None


def test_a_machine_that_cannot_be_measured_is_served_as_asked(make_engine, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no memory")
        yield

    monkeypatch.setattr("ragkv.engine.measure_machine", broken)
    engine = make_engine(controller="on")
    eventually(lambda: "no memory" in caplog.text)
    engine.ingest("c", DOCUMENTS)
    assert engine.query(QUESTION, collection="c").forecast is None
