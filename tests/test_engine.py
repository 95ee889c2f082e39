"""The engine's doors in process: answers, events, reports, many callers at once."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from ragkv.engine import Engine
from ragkv.errors import ConfigError, EngineClosedError, InputError, NotAModelError, NotFoundError
from ragkv.paged import BLOCK_TOKENS
from ragkv.types import Answer, DoneEvent, Message, QueryRequest, SourcesEvent, TokenEvent
from tests.conftest import save_checkpoint
from tests.engine_kit import (
    DOCUMENTS,
    NAMES,
    QUESTION,
    Probe,
    decoding,
    document,
    eventually,
    in_threads,
    prefilling,
    wait_idle,
)

METHODS = ["none", "epic", "random", "question", "hkvd", "full"]
LAYERS = 4


@pytest.fixture(scope="module")
def shared(tiny_checkpoint, tmp_path_factory):
    """One engine for the tests that only ask."""
    settings = {
        "chunk_tokens": 32,
        "context_tokens": 64,
        "dtype": "float32",
        "device": "cpu",
        "max_tokens": 8,
        "controller": "off",
    }
    with Engine(model=str(tiny_checkpoint), data_dir=tmp_path_factory.mktemp("shared"), **settings) as engine:
        engine.ingest("c", DOCUMENTS)
        yield engine


def check_report(answer: Answer, layers: int = LAYERS) -> None:
    """What every answer must hold, whatever happened."""
    sources = answer.sources
    assert answer.usage.context_tokens == sum(c.tokens for c in sources)
    prefix = answer.usage.prefix_tokens
    assert 0 <= prefix < answer.usage.prompt_tokens
    assert prefix % BLOCK_TOKENS == 0
    assert answer.usage.cached_tokens == prefix + sum(c.tokens - c.repaired_tokens for c in sources if c.kv != "prefix")
    total = answer.usage.context_tokens * layers
    recomputed = sum(c.recomputed_token_layers for c in sources)
    assert answer.recomputed_share == pytest.approx(recomputed / total if total else 0.0)
    for chunk in answer.chunks:
        assert 0 <= chunk.repaired_tokens <= chunk.tokens
        assert chunk.recomputed_token_layers <= chunk.tokens * layers
        if chunk.kv == "prefix":
            assert chunk.why
            assert chunk.recomputed_token_layers == chunk.repaired_tokens == 0
        if chunk.kv == "computed":
            assert chunk.why
            assert chunk.recomputed_token_layers == chunk.tokens * layers
        if chunk.kv == "dropped":
            assert chunk.why
            assert chunk.position is None
    # Each chunk is either in the known beginning, or behind it.
    assert all((c.kv == "prefix") == (c.position < prefix) for c in sources)
    assert all(c.position + c.tokens <= prefix for c in sources if c.kv == "prefix")
    positions = [(c.position, c.position + c.tokens) for c in sources]
    assert positions == sorted(positions)
    assert all(a[1] == b[0] for a, b in pairwise(positions))
    timing = answer.timing
    parts = ("retrieve", "plan", "queue", "lookup", "load", "select", "recompute", "first_token")
    assert sum(getattr(timing, part + "_ms") for part in parts) == pytest.approx(timing.ttft_ms)
    assert all(getattr(timing, part + "_ms") >= 0 for part in parts)
    assert 0 < timing.ttft_ms <= timing.total_ms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["document", "alone"])
def test_the_report_of_every_method_adds_up(shared, method, policy):
    answer = shared.query(QUESTION, collection="c", method=method, ratio=0.3, context_policy=policy, top_k=8)
    check_report(answer)
    assert (answer.method, answer.context_policy) == (method, policy)
    assert answer.ratio == (None if method in ("none", "full") else 0.3)
    assert len(answer.sources) == 8
    if method == "full":
        assert answer.recomputed_share == 1.0
        assert answer.usage.cached_tokens == 0
    if method == "none" and policy == "document":
        assert answer.recomputed_share == 0.0
        assert {c.kv for c in answer.chunks} <= {"ram", "ssd"}


@pytest.mark.parametrize("method", ["epic", "random", "question"])
def test_a_ratio_of_all_recomputes_every_repairable_token(shared, method):
    answer = shared.query(QUESTION, collection="c", filters={"initial": "B"}, top_k=50, method=method, ratio=1.0)
    assert answer.recomputed_share == 1.0
    assert answer.text == shared.query(QUESTION, collection="c", filters={"initial": "B"}, top_k=50, method="full").text


def test_tokens_whose_context_is_missing_are_not_repaired_and_that_is_said(shared):
    answer = shared.query(QUESTION, collection="c", top_k=6, method="epic", ratio=1.0)
    lonely = [c for c in answer.chunks if c.why]
    assert lonely
    for chunk in lonely:
        assert "document context is not in this prompt" in chunk.why
        assert chunk.repaired_tokens == 0


def test_events_are_sources_then_tokens_then_done(shared):
    events = list(shared.stream(QUESTION, collection="c", max_tokens=20))
    assert isinstance(events[0], SourcesEvent)
    assert isinstance(events[-1], DoneEvent)
    assert all(isinstance(event, TokenEvent) and event.text for event in events[1:-1])
    answer = events[-1].answer
    assert "".join(event.text for event in events[1:-1]) == answer.text != ""
    assert events[0].id == answer.id
    announced = [source.model_dump() for source in events[0].sources]
    assert announced == [{key: getattr(c, key) for key in announced[0]} for c in answer.sources]


def test_without_documents_the_model_answers_alone(shared):
    answer = shared.query(QUESTION)
    check_report(answer)
    assert (answer.chunks, answer.recomputed_share, answer.usage.context_tokens) == ([], 0.0, 0)


def test_usage_and_length(shared):
    answer = shared.query(QUESTION, collection="c", max_tokens=5)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 5)
    one = shared.query(QUESTION, collection="c", max_tokens=1)
    assert (one.finish_reason, one.usage.completion_tokens) == ("length", 1)
    assert answer.text.startswith(one.text)
    assert answer.usage.prompt_tokens > answer.usage.context_tokens > 0


def test_an_end_token_ends_the_answer_and_is_no_text(shared, monkeypatch):
    whole = shared.query(QUESTION, max_tokens=8)
    seen = [token.token_id for token in shared.query(QUESTION, max_tokens=8, logprobs=0).logprobs]
    at = next(i for i in range(2, 7) if seen[i] not in seen[:i])
    monkeypatch.setattr(shared._checkpoint.runner, "eos_ids", frozenset({seen[at]}))
    cut = shared.query(QUESTION, max_tokens=8)
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("stop", at)
    assert cut.text == shared._checkpoint.tokenizer.decode(seen[:at])
    assert whole.text.startswith(cut.text)
    monkeypatch.setattr(shared._checkpoint.runner, "eos_ids", frozenset({seen[0]}))
    empty = shared.query(QUESTION, max_tokens=8)
    assert (empty.text, empty.finish_reason, empty.usage.completion_tokens) == ("", "stop", 0)


def test_a_stop_string_ends_the_answer_and_the_work(shared):
    whole = shared.query(QUESTION, max_tokens=40).text
    stop = whole[10:14]
    events = list(shared.stream(QUESTION, max_tokens=1500, stop=[stop]))
    answer = events[-1].answer
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(event.text for event in events[1:-1]) == answer.text
    assert answer.usage.completion_tokens < 40
    wait_idle(shared)


def test_the_same_seed_gives_the_same_answer(shared):
    fields = {"temperature": 1.5, "collection": "c", "max_tokens": 12}
    one, two, other = (shared.query(QUESTION, seed=seed, **fields).text for seed in (3, 3, 4))
    assert one == two != other


def test_answers_do_not_depend_on_who_else_asks(shared):
    requests = [
        QueryRequest(question=f"Where did {name} live?", collection="c", method=method, max_tokens=12)
        for name, method in zip(NAMES, METHODS, strict=False)
    ]
    requests += [QueryRequest(question="And you?", max_tokens=30, temperature=1.0, seed=5)]
    requests += [QueryRequest(question="What?", documents=[{"text": "Not stored."}], method="full", max_tokens=3)]
    solo = [shared.query(request).text for request in requests]
    wait_idle(shared)
    with in_threads(*(lambda request=request: shared.query(request) for request in requests * 3)) as answers:
        pass
    assert [answer.text for answer in answers] == solo * 3
    for answer in answers:
        check_report(answer)
    wait_idle(shared)


def test_earlier_turns_change_the_answer(shared):
    history = [Message(role="user", content="I am Enno."), Message(role="assistant", content="Hello Enno.")]
    answer = shared.query("Who am I?", history=history)
    assert answer.usage.prompt_tokens > shared.query("Who am I?").usage.prompt_tokens
    check_report(answer)


def test_a_repeated_question_finds_its_beginning_unless_it_names_a_method(make_engine):
    engine = make_engine()
    engine.ingest("c", DOCUMENTS, encode="lazy")
    asked = {"collection": "c", "max_tokens": 12}
    first, again = engine.query(QUESTION, **asked), engine.query(QUESTION, **asked)
    assert {c.kv for c in again.sources} == {"prefix"}
    assert (first.usage.prefix_tokens, again.recomputed_share) == (0, 0.0)
    assert again.usage.prefix_tokens >= again.usage.context_tokens
    assert again.text == first.text
    wait_idle(engine)
    for method in ("full", "none"):
        named = engine.query(QUESTION, method=method, **asked)
        assert named.usage.prefix_tokens == 0
        assert {c.kv for c in named.sources} <= ({"computed"} if method == "full" else {"ram", "ssd"})
        check_report(named)
    check_report(again)


def test_idle_conversations_on_disk_are_counted_and_may_be_cleared_at_any_time(make_engine):
    engine = make_engine(pool_bytes=2**20, swap_bytes=2**20)
    questions = [f"{QUESTION} {name} knows. " * 20 for name in NAMES]
    answers = [engine.query(question).text for question in questions]
    eventually(lambda: engine.cache_stats().session_bytes)
    assert engine.cache_clear() > 0
    eventually(lambda: engine.cache_clear() == engine.cache_stats().session_bytes == 0)  # some were on their way
    assert [engine.query(question).text for question in questions] == answers


def test_fields_override_those_of_a_request(shared):
    request = QueryRequest(question=QUESTION, max_tokens=8, collection="c")
    answer = shared.query(request, max_tokens=2)
    assert answer.usage.completion_tokens == 2
    assert answer.usage.context_tokens > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"nonsense": 1},
        {"max_tokens": 0},
        {"top_p": 0.0},
        {"temperature": -1},
        {"ratio": 2},
        {"method": "magic"},
        {"stop": [""]},
        {"history": [{"role": "system", "content": "x"}]},
        {"history": [{"role": "user", "content": "\ud800"}]},
        {"system": "\ud800"},
        {"documents": [{"text": "\ud800"}]},
        {"documents": [{"text": "x", "title": "\ud800"}]},
    ],
)
def test_a_wrong_field_is_an_input_error_that_names_it(shared, fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        shared.query(QUESTION, **fields)


@pytest.mark.parametrize("question", ["", "\ud800", 5, None])
def test_a_question_that_is_none(shared, question):
    with pytest.raises(InputError, match="question"):
        shared.query(question)


def test_errors_come_when_the_stream_is_read_and_leave_the_engine_well(shared):
    stream = shared.stream(QUESTION, collection="nowhere")
    with pytest.raises(NotFoundError, match="nowhere"):
        next(stream)
    assert shared.health().status == "ok"
    assert shared.query(QUESTION).text


# asyncio


def test_async_answers_are_the_same(shared):
    async def ask():
        answer = await shared.aquery(QUESTION, collection="c")
        events = [event async for event in shared.astream(QUESTION, collection="c")]
        many = await asyncio.gather(*(shared.aquery(QUESTION, collection="c") for _ in range(4)))
        return answer, events, many

    answer, events, many = asyncio.run(ask())
    assert {answer.text, events[-1].answer.text, *(one.text for one in many)} == {
        shared.query(QUESTION, collection="c").text
    }
    assert isinstance(events[0], SourcesEvent)
    assert "".join(event.text for event in events[1:-1]) == answer.text


def test_async_errors(shared):
    with pytest.raises(NotFoundError):
        asyncio.run(shared.aquery(QUESTION, collection="nowhere"))
    with pytest.raises(InputError):
        asyncio.run(shared.aquery(QUESTION, nonsense=1))


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_cancelling_the_task_cancels_the_request(make_engine, state):
    engine = make_engine()
    probe = Probe(engine)
    probe.hold(decoding if state == "decode" else prefilling)

    async def ask():
        task = asyncio.create_task(engine.aquery(QUESTION, max_tokens=1500))
        await asyncio.to_thread(probe.wait_held)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        probe.release()

    asyncio.run(ask())
    wait_idle(engine)
    assert len(probe.layers) == (LAYERS if state == "decode" else 1)
    assert len(probe.steps) == (1 if state == "decode" else 0)
    eventually(probe.all_released)


def test_closing_an_async_stream_cancels_the_request(make_engine):
    engine = make_engine()
    probe = Probe(engine)

    async def ask():
        stream = engine.astream(QUESTION, max_tokens=1500)
        async for event in stream:
            if isinstance(event, TokenEvent):
                break
        await stream.aclose()

    asyncio.run(ask())
    wait_idle(engine)
    assert len(probe.steps) < 1499
    eventually(probe.all_released)


# The engine's own life


def test_health_and_metrics(shared):
    health = shared.health()
    assert health.layer_loop == "plain: the fused layer loop needs CUDA"
    assert (health.status, health.blending, health.device, health.dtype) == ("ok", "on", "cpu", "float32")
    metrics = shared.metrics()
    assert metrics["store_entries"] == shared.cache_stats().entries > 0
    assert shared.cache_check().ok


def test_a_model_whose_kv_cannot_be_moved_is_served_by_full_prefill_and_says_so(make_engine, tmp_path, caplog):
    model = save_checkpoint(tmp_path / "m", "llama-dynamic", vocab_size=8192, max_position_embeddings=2048)
    engine = make_engine(model=str(model))
    engine.ingest("c", DOCUMENTS[:2], encode="lazy")
    health = engine.health()
    assert health.status == "degraded"
    assert "dynamic" in health.blending
    assert "dynamic" in caplog.text
    answer = engine.query(QUESTION, collection="c")
    check_report(answer)
    assert answer.recomputed_share == 1.0
    assert {c.why for c in answer.chunks} == {health.blending}
    wait_idle(engine)
    assert engine.cache_stats().entries == 0


def test_closing_twice_and_asking_after(make_engine):
    engine = make_engine()
    engine.ingest("c", DOCUMENTS[:1])
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.query(QUESTION)
    with pytest.raises(EngineClosedError):
        asyncio.run(engine.aquery(QUESTION, collection="c"))
    with pytest.raises(EngineClosedError):
        engine.ingest("c", [document("Late")])


def test_a_closed_engine_can_be_opened_again_over_the_same_data(make_engine):
    with make_engine() as engine:
        engine.ingest("c", DOCUMENTS[:2])
        expected = engine.query(QUESTION, collection="c", method="none")
    again = make_engine().query(QUESTION, collection="c", method="none")
    assert again.text == expected.text
    assert {c.kv for c in again.chunks} == {"ssd"}


def test_a_model_that_cannot_be_loaded_leaves_the_data_free(make_engine, tmp_path):
    with pytest.raises(NotAModelError):
        make_engine(model=str(tmp_path / "nothing"))
    make_engine()


def test_a_wrong_setting_is_refused_before_anything_is_touched(tmp_path):
    with pytest.raises(ConfigError, match="chunk_token"):
        Engine(chunk_token=3, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_documents_can_be_listed_read_and_dropped(make_engine):
    engine = make_engine()
    engine.ingest("c", DOCUMENTS, encode="lazy")
    assert [info.id for info in engine.documents("c", offset=1, limit=2)] == ["bela", "cyro"]
    read = engine.document("c", "ada")
    assert read.text == DOCUMENTS[0].full_text
    assert (read.title, read.metadata) == ("Life of Ada", {"initial": "A"})
    assert [(c.name, c.documents) for c in engine.collections()] == [("c", 5)]
    engine.drop_collection("c")
    assert engine.collections() == []
    for call in (engine.documents, engine.drop_collection):
        with pytest.raises(NotFoundError):
            call("c")
    with pytest.raises(NotFoundError):
        engine.document("c", "ada")


def test_another_salt_finds_nothing_of_what_is_stored(make_engine):
    engine = make_engine(store_salt="salt of one")
    engine.ingest("c", DOCUMENTS)
    assert engine.estimate(DOCUMENTS).new_kv_bytes == 0
    engine.close()
    for salt, found in (("salt of one", True), ("salt of two", False), (None, False)):
        engine = make_engine(store_salt=salt)
        assert (engine.estimate(DOCUMENTS).new_kv_bytes == 0) == found
        engine.close()


@pytest.mark.parametrize(
    ("fields", "kept"), [({}, "some"), ({"method": "links"}, "none"), ({"session_id": "s"}, "all")], ids=str
)
def test_kv_that_nobody_can_ask_for_is_not_kept(make_engine, fields, kept):
    """A blend's, of which only the prompt's beginning is exact, without a session: nobody would find it."""
    engine = make_engine(controller="off")
    engine.ingest("c", DOCUMENTS)
    answer = engine.query(QUESTION, collection="c", max_tokens=8, **fields)
    assert {chunk.kv for chunk in answer.chunks} <= {"ssd", "ram"}
    engine._loop._pool.settle()
    idle, prompt = engine.metrics()["pool_idle_blocks"], answer.usage.prompt_tokens // 16
    assert {"none": idle == 0, "some": 0 < idle < prompt / 2, "all": idle >= prompt}[kept]
