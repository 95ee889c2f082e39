"""The engine thread: fairness between prefill and decode, cancelling, failures, the end."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ragkv import decodes, loop
from ragkv.active import Active, Phase
from ragkv.engine import Engine
from ragkv.errors import EngineClosedError, QueueFullError
from ragkv.types import DoneEvent, SourcesEvent, TokenEvent
from tests.engine_kit import (
    DOCUMENTS,
    QUESTION,
    Probe,
    Ran,
    decoding,
    document,
    eventually,
    in_threads,
    prefilling,
    wait_idle,
)

LAYERS = 4


@pytest.fixture
def one_at_a_time(make_engine):
    return make_engine(max_running=1, max_queued=1)


def steps_between(log: list[Ran], rows: int) -> list[list[int]]:
    """Rows of the decode steps between consecutive prefill layers of ``rows`` rows."""
    at = [i for i, ran in enumerate(log) if ran == Ran("layer", rows)]
    return [[ran.rows for ran in log[a:b] if decoding(ran)] for a, b in pairwise(at)]


def test_a_long_prefill_gives_every_running_request_a_token_between_layers(make_engine):
    engine = make_engine(stall_ms=1e-6)
    probe = Probe(engine)
    running = [engine.stream(f"Question {i}?", max_tokens=40) for i in range(2)]
    for stream in running:
        next(stream)
    eventually(lambda: 2 in probe.steps)
    probe.hold(decoding)
    probe.wait_held()
    probe.log.clear()
    late = engine.stream("And now?", documents=[{"text": document("Long", 60).text}], method="full", max_tokens=1)
    with in_threads(lambda: list(late)) as results:
        eventually(lambda: engine.health().queued == 1)
        probe.release()
    [events] = results
    rows = events[-1].answer.usage.prompt_tokens
    assert rows > 500
    assert steps_between(probe.log, rows) == [[2]] * (LAYERS - 1)
    for stream in running:
        assert isinstance(list(stream)[-1], DoneEvent)


def test_encoding_in_the_background_gives_running_requests_tokens_between_layers(engine, monkeypatch):
    monkeypatch.setattr(loop, "ENCODE_SLICE_S", 0.0)
    probe = Probe(engine)
    stream = engine.stream(QUESTION, max_tokens=60)
    probe.hold(decoding)
    next(stream)
    probe.wait_held()
    with in_threads(lambda: engine.ingest("c", DOCUMENTS[:2])):
        eventually(lambda: engine._loop._encodings)
        probe.log.clear()
        probe.release()
    list(stream)
    encoded = probe.layers[0]
    assert steps_between(probe.log, encoded)[: LAYERS - 1] == [[1]] * (LAYERS - 1)


def test_encoding_goes_on_while_requests_keep_coming(make_engine):
    """Under steady load, too: otherwise what a prompt lacked would never be stored."""
    engine = make_engine(max_queued=8)
    probe = Probe(engine)
    probe.hold(prefilling)
    fields = {"method": "full", "max_tokens": 1}  # every prompt is computed whole
    first = engine.stream(QUESTION, **fields)
    with in_threads(lambda: list(first)):
        probe.wait_held()
        with in_threads(*[lambda: engine.query(QUESTION, **fields)] * 6, lambda: engine.ingest("c", DOCUMENTS[:1])):
            eventually(lambda: engine.health().queued == 6 and engine._loop._encodings)
            probe.release()
    prompt = probe.layers[0]
    last_prompt = max(i for i, rows in enumerate(probe.layers) if rows == prompt)
    first_encoded = min(i for i, rows in enumerate(probe.layers) if rows != prompt)
    assert first_encoded < last_prompt


def test_a_request_cancelled_while_it_waits_never_runs(one_at_a_time):
    engine = one_at_a_time
    probe = Probe(engine)
    first = engine.stream(QUESTION, max_tokens=4)
    probe.hold(decoding)
    next(first)
    probe.wait_held()
    second = engine.stream("Another question, of another length?", max_tokens=4)
    assert isinstance(next(second), SourcesEvent)
    second.close()
    probe.release()
    assert isinstance(list(first)[-1], DoneEvent)
    wait_idle(engine)
    assert len(probe.layers) == LAYERS
    eventually(probe.all_released)


def test_the_cancelled_do_not_fill_the_queue(one_at_a_time):
    engine = one_at_a_time
    first = engine.stream(QUESTION, max_tokens=1500)
    next(first)
    next(first)
    second = engine.stream(QUESTION)
    next(second)
    second.close()
    eventually(lambda: engine.health().queued == 0)
    assert engine.health().running == 1
    assert isinstance(next(engine.stream(QUESTION)), SourcesEvent)
    first.close()
    wait_idle(engine)


@pytest.mark.parametrize("method", ["full", "question", "hkvd", "none"])
def test_a_request_cancelled_in_prefill_stops_at_the_next_layer_and_lets_go_of_everything(engine, method):
    engine.ingest("c", DOCUMENTS)
    entries = engine.cache_stats().entries
    probe = Probe(engine)
    stream = engine.stream(QUESTION, collection="c", method=method)
    probe.hold(lambda ran: prefilling(ran) and len(probe.layers) == 1)
    next(stream)
    probe.wait_held()
    stream.close()
    probe.release()
    wait_idle(engine)
    assert len(probe.layers) == 2
    eventually(probe.all_released)
    assert engine.cache_clear() == entries, "entries are still leased"


def test_a_request_cancelled_in_decode_stops(engine):
    engine.ingest("c", DOCUMENTS)
    probe = Probe(engine)
    stream = engine.stream(QUESTION, collection="c", max_tokens=1000)
    assert isinstance(next(stream), SourcesEvent)
    assert isinstance(next(stream), TokenEvent)
    stream.close()
    wait_idle(engine)
    assert len(probe.steps) < 999
    eventually(probe.all_released)


def test_leases_end_with_the_prefill(engine):
    engine.ingest("c", DOCUMENTS)
    probe = Probe(engine)
    stream = engine.stream(QUESTION, collection="c", max_tokens=4)
    probe.hold(decoding)
    next(stream)
    probe.wait_held()
    entries = engine.cache_stats().entries
    assert engine.cache_clear() == entries > 0
    probe.release()
    assert isinstance(list(stream)[-1], DoneEvent)


def test_a_full_queue_refuses_and_what_is_queued_still_runs(one_at_a_time):
    engine = one_at_a_time
    probe = Probe(engine)
    first, second, third = (engine.stream(QUESTION, max_tokens=4) for _ in range(3))
    probe.hold(decoding)
    next(first)
    probe.wait_held()
    next(second)
    with pytest.raises(QueueFullError, match="try again later") as caught:
        next(third)
    assert caught.value.context == {"setting": "max_queued", "value": 1}
    assert (engine.health().running, engine.health().queued) == (1, 1)
    probe.release()
    assert isinstance(list(first)[-1], DoneEvent)
    assert isinstance(list(second)[-1], DoneEvent)


class FaultError(RuntimeError):
    pass


def fail_in(where: str, engine: Engine, monkeypatch, victim: Active) -> None:
    """From now on ``victim`` cannot be computed, whoever is computed along with it."""
    module = {"first sampling": loop, "later sampling": decodes}.get(where)
    if module is not None:
        sample = module.sample

        def choose(logits, samplers):
            if any(sampler.params == victim.generation.sampling for sampler in samplers):
                raise FaultError("no token")
            return sample(logits, samplers)

        monkeypatch.setattr(module, "sample", choose)
    elif where == "prefill":
        runner = engine._checkpoint.runner
        run_layer = runner.run_layer

        def run(layer, rows):
            if victim.phase is Phase.PREFILL and layer == 1:
                raise FaultError("no layer")
            run_layer(layer, rows)

        runner.run_layer = run
    else:
        decoder = engine._loop._decodes._decoder
        step = decoder.step

        def decode(lanes):
            if victim.lane in lanes:
                raise FaultError("no step")
            return step(lanes)

        decoder.step = decode


@pytest.mark.parametrize("where", ["prefill", "first sampling", "decode", "later sampling"])
def test_a_failing_request_leaves_the_others_alive(engine, monkeypatch, where):
    monkeypatch.setattr(loop.log, "error", lambda *_, **__: None)  # pytest's records would keep the KV alive
    wanted = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "presence_penalty": 0.5}
    expected = engine.query(QUESTION, **wanted).text
    probe = Probe(engine)
    healthy = engine.stream(QUESTION, **wanted)
    probe.hold(decoding)
    next(healthy)
    probe.wait_held()
    victim = engine.stream("Another one, which will fail?", max_tokens=5, seed=2)
    request_id = next(victim).id
    fail_in(where, engine, monkeypatch, engine._loop._by_id[request_id])
    probe.release()
    with pytest.raises(FaultError):
        list(victim)
    assert list(healthy)[-1].answer.text == expected
    wait_idle(engine)
    assert engine.health().status == "ok"
    assert engine.query(QUESTION, **wanted).text == expected
    eventually(probe.all_released)


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"temperature": 1e-300, "top_p": 1e-300, "seed": 1}])
def test_extreme_sampling_settings_do_not_kill_the_engine(engine, options):
    assert engine.query(QUESTION, **options).text == engine.query(QUESTION).text
    assert engine.health().status == "ok"


def test_closing_ends_every_request_in_flight_with_an_error(make_engine):
    engine = make_engine(max_running=2)
    probe = Probe(engine)
    running = engine.stream(QUESTION, max_tokens=100)
    next(running)
    next(running)
    probe.hold(lambda ran: ran.rows > 300)
    long = {"documents": [{"text": document("Long", 40).text}], "method": "full"}
    calls = [
        lambda: list(running),
        lambda: list(engine.stream(QUESTION, **long)),
        lambda: list(engine.stream(QUESTION)),
        lambda: engine.ingest("c", DOCUMENTS),
    ]
    with in_threads(*calls[:2]) as first:
        probe.wait_held()
        with in_threads(*calls[2:]) as second:
            eventually(lambda: engine.health().queued == 1 and engine._loop._encodings)
            with in_threads(engine.close) as closing:
                eventually(lambda: engine._loop._closed)
                probe.release()
    assert closing == [None]
    for result in [*first, *second]:
        assert isinstance(result, EngineClosedError)


def test_closing_while_a_first_token_reports_missing_chunks_is_no_failure(engine, monkeypatch, caplog):
    encode_later = engine._ingestor.encode_later

    def closed_meanwhile(spans):
        engine._loop._closed = True
        encode_later(spans)

    monkeypatch.setattr(engine._ingestor, "encode_later", closed_meanwhile)
    with pytest.raises(EngineClosedError):
        engine.query(QUESTION, documents=[{"text": "One sentence."}], max_tokens=5)
    engine.close()
    assert engine.health().status == "ok"
    assert engine.health().encoding == 0
    assert not caplog.records


def test_a_dead_engine_thread_is_told_to_everyone(engine, monkeypatch):
    def die():
        raise FaultError("out of everything")

    monkeypatch.setattr(engine._loop, "_turn", die)
    for _ in range(2):
        with pytest.raises(EngineClosedError, match="out of everything"):
            engine.query(QUESTION)
    with pytest.raises(EngineClosedError, match="out of everything"):
        engine.ingest("c", DOCUMENTS)
    health = engine.health()
    assert health.status == "failed"
    assert "out of everything" in health.blending
    engine.close()
