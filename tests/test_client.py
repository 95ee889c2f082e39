"""The SDK, sync and async, against the real app; error mapping; the event stream's parser."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from ragkv import errors
from ragkv.client import AsyncClient, Client
from ragkv.server import create_app
from ragkv.sse import Decoder, ServerSentEvent, encode
from ragkv.types import DocumentIn, DoneEvent, QueryRequest
from tests.fake_engine import KEY, FakeEngine, serving, wait_for

ROOT = Path(__file__).parents[1]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    return FakeEngine(api_key=KEY, max_document_bytes=1000)


class Blocking:
    """AsyncClient behind Client's face, so that every test below runs both."""

    def __init__(self, engine):
        self._loop = asyncio.new_event_loop()
        transport = httpx.ASGITransport(create_app(engine))
        self._client = AsyncClient("http://127.0.0.1", engine.settings.bearer_key, transport=transport)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            result = getattr(self._client, name)(*args, **kwargs)
            if name == "stream":
                return self._iterate(result)
            return self._loop.run_until_complete(result)

        return call

    def close(self):
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _iterate(self, events):
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(events))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(events.aclose())


@pytest.fixture(params=["sync", "async"])
def client(request, engine):
    if request.param == "async":
        with contextlib.closing(Blocking(engine)) as client:
            yield client
    else:
        with serving(engine) as url, Client(url, KEY) as client:
            yield client


def answering(*responses, **fields):
    """A Client whose server gives these answers."""
    waiting = list(responses)
    transport = httpx.MockTransport(lambda _: waiting.pop(0))
    return Client(transport=transport, **fields)


def test_every_call_there_and_back(client, engine, tmp_path):
    (tmp_path / "up.txt").write_text("uploaded")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.md").write_text("# A\ntext")
    (tmp_path / "folder" / ".hidden.md").write_text("no")
    documents = ["text alone", {"id": "a/b.txt", "text": "x"}, DocumentIn(id="..", text="y", title="T")]
    report = client.add_documents("c", iter(documents), encode="lazy")
    assert (report.added, report.rejected) == (3, [])
    assert client.upload("c", tmp_path / "up.txt", str(tmp_path / "folder"), encode="eager").added == 2
    assert engine.encode == ["lazy", "eager"]
    assert [d.id for d in client.documents("c", limit=2, offset=1)] == ["a/b.txt", ".."]
    assert client.document("c", "..").text == "y"
    assert client.document("c", "deep/a.md").title == "A"
    client.delete_document("c", "a/b.txt")
    with pytest.raises(errors.NotFoundError):
        client.delete_document("c", "a/b.txt")
    assert [c.name for c in client.collections()] == ["c"]
    client.drop_collection("c")
    assert client.collections() == []
    assert client.health().status == "ok"
    assert client.cache_stats().entries == 3
    assert client.cache_check(fix=True).fixed
    assert client.cache_clear() == 3


def test_a_query_takes_a_question_or_a_request_and_fields(client, engine):
    assert client.query("who", top_k=3, documents=[{"text": "x"}]).text == "who"
    assert client.query(QueryRequest(question="who", seed=1), seed=2).timing.ttft_ms == 250
    assert engine.requests[0].documents == [DocumentIn(text="x")]
    assert engine.requests[1].model_dump(exclude_unset=True) == {"question": "who", "seed": 2}


def test_a_stream_yields_typed_events(client):
    events = list(client.stream("ein Fluß in Köln 北京", top_k=2))
    assert [e.type for e in events] == ["sources", "token", "token", "token", "token", "token", "done"]
    assert "".join(e.text for e in events[1:-1]) == events[-1].answer.text == "ein Fluß in Köln 北京"
    assert isinstance(events[-1], DoneEvent)


def test_closing_the_stream_stops_the_generation(engine):
    engine.endless, engine.pace = True, 0.005
    with serving(engine) as url, Client(url, KEY) as client:
        events = client.stream("go on")
        assert [next(events).type for _ in range(3)] == ["sources", "token", "token"]
        assert not engine.cancelled.is_set()
        events.close()
        assert wait_for(engine.cancelled)


@pytest.mark.anyio
async def test_leaving_an_async_stream_stops_the_generation(engine):
    engine.endless, engine.pace = True, 0.005
    with serving(engine) as url:
        async with AsyncClient(url, KEY) as client:
            async with contextlib.aclosing(client.stream("go on")) as events:
                assert (await anext(events)).type == "sources"
            assert await asyncio.to_thread(wait_for, engine.cancelled)


@pytest.mark.anyio
async def test_cancelling_an_async_query_stops_the_generation(engine):
    engine.think = 60
    with serving(engine) as url:
        async with AsyncClient(url, KEY) as client:
            task = asyncio.create_task(client.query("x"))
            assert await asyncio.to_thread(wait_for, engine.started)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(wait_for, engine.cancelled)


def leaves(kind=errors.RagkvError):
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from leaves(child)


@pytest.mark.parametrize("kind", list(leaves()))
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_arrives_as_its_own_class(kind, stream):
    body = {"error": {"code": kind.code, "message": "m", "context": {"path": "p", "message": "n"}}}
    client = answering(httpx.Response(503, json=body))
    with pytest.raises(errors.RagkvError) as caught:
        list(client.stream("x")) if stream else client.query("x")
    assert type(caught.value) is kind
    assert caught.value.message == "m"
    assert caught.value.context["path"] == "p"


def test_errors_of_the_app_arrive(client, engine):
    engine.fail = errors.QueueFullError("full", waiting=64)
    with pytest.raises(errors.QueueFullError, match="full") as caught:
        client.query("x")
    assert caught.value.context == {"waiting": 64}
    with pytest.raises(errors.QueueFullError):
        next(client.stream("x"))
    engine.fail = None
    engine.fail_after = (1, errors.StoreError("the disk went away"))
    with pytest.raises(errors.StoreError, match="went away"):
        list(client.stream("a b c"))
    with pytest.raises(errors.DocumentError):
        client.add_documents("c", ["x" * 1001])


def test_a_wrong_key_is_a_server_error_with_its_status(engine):
    with (
        serving(engine) as url,
        Client(url, "wrong-key") as client,
        pytest.raises(errors.ServerError, match="api_key") as caught,
    ):
        client.collections()
    assert caught.value.context["status"] == 401


def test_health_of_a_failed_server_is_an_answer(client, engine):
    engine.status = "failed"
    assert client.health().status == "failed"


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(502, text="<html>bad gateway"),
        httpx.Response(200, text="<html>hello"),
        httpx.Response(200, json={"hello": 1}),
        httpx.Response(200),
        httpx.Response(500, json=[]),
        httpx.Response(503, json={"error": {"code": "new_code", "message": "m", "context": {}}}),
        httpx.Response(503, json={"error": {"code": "server", "message": "m", "context": {}}}),
    ],
)
def test_what_is_not_an_answer_is_a_server_error(response):
    with pytest.raises(errors.ServerError) as caught:
        answering(response).health()
    assert caught.value.context["status"] == response.status_code


def test_no_server_says_how_to_start_one():
    with Client("http://127.0.0.1:1") as client:
        for call in (client.health, lambda: next(client.stream("x"))):
            with pytest.raises(errors.ServerError, match="ragkv serve"):
                call()


def test_a_server_that_does_not_answer_in_time(engine):
    engine.think = 60
    with (
        serving(engine) as url,
        Client(url, KEY, timeout=0.1) as client,
        pytest.raises(errors.ServerError, match="in time"),
    ):
        client.query("x")


def test_a_proxy_is_not_asked_for_a_local_server(engine, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving(engine) as url, Client(url, KEY) as client:
        assert client.health().status == "ok"


def test_arguments_that_cannot_be_sent_are_input_errors(tmp_path):
    client = Client()
    (tmp_path / "a").mkdir()
    for name in ("x.txt", "a/x.txt"):
        (tmp_path / name).write_text("x")
    bad = [
        lambda: client.query("x", top_k=0),
        lambda: client.query("x", tok_k=3),
        lambda: client.query(""),
        lambda: client.query(5),
        lambda: client.stream(None),
        lambda: client.stream("x", temperature=-1),
        lambda: client.add_documents("c", [{"txt": "x"}]),
        lambda: client.add_documents("c", [{"text": "x", "metadata": {"a": object()}}]),
        lambda: client.add_documents("c", "x"),
        lambda: client.add_documents("c", {"text": "x"}),
        lambda: client.add_documents("c", [5]),
        lambda: client.add_documents("n/o", ["x"]),
        lambda: client.drop_collection(5),
        lambda: client.document("c", ""),
        lambda: client.drop_collection(""),
        lambda: client.upload("c"),
        lambda: client.upload("c", tmp_path / "absent.txt"),
        lambda: client.upload("c", tmp_path / "x.txt", tmp_path / "a" / "x.txt"),
    ]
    for call in bad:
        with pytest.raises(errors.InputError):
            call()
    with pytest.raises(errors.InputError, match="top_k"):
        bad[0]()
    with pytest.raises(errors.InputError, match=r"documents\[1\]\.text: Field required"):
        client.add_documents("c", ["x", {"id": "n1"}])


def test_a_closed_client_says_so():
    client = Client()
    client.close()
    for call in (client.health, lambda: next(client.stream("x"))):
        with pytest.raises(errors.ServerError, match="closed; make another"):
            call()


@pytest.mark.anyio
async def test_a_closed_async_client_says_so():
    client = AsyncClient()
    await client.aclose()
    with pytest.raises(errors.ServerError, match="closed; make another"):
        await client.health()
    with pytest.raises(errors.ServerError, match="closed; make another"):
        await anext(client.stream("x"))


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"", errors.ServerError),
        (encode("token", '{"type":"token","text":"x"}'), errors.ServerError),
        (encode("token", "not json"), errors.ServerError),
        (encode("error", "not json"), errors.ServerError),
        (encode("error", '{"error":{"code":"store","message":"m","context":{}}}'), errors.StoreError),
    ],
)
def test_a_stream_that_ends_before_its_answer_is_an_error(stream, error):
    with pytest.raises(error):
        list(answering(httpx.Response(200, content=stream)).stream("x"))


def test_events_of_names_unknown_yet_are_skipped():
    stream = encode("news", "x") + encode("token", '{"type":"token","text":"x"}')
    events = answering(httpx.Response(200, content=stream)).stream("x")
    assert next(events).text == "x"


_STREAM = (
    ": comment\r\n\r\nevent: a\r\ndata: ä\r\ndata:  two\r\nid: 7\r\n\r\n"
    'data\n\nevent: empty\n\ndata:plain\rdata: cr\r\revent: b\ndata: {"x":1}\n\nevent: cut\ndata: off'
)
_EVENTS = [
    ServerSentEvent("a", "ä\n two"),
    ServerSentEvent("message", ""),
    ServerSentEvent("message", "plain\ncr"),
    ServerSentEvent("b", '{"x":1}'),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_decoder_takes_any_cut_and_line_end(size, mark):
    wire = mark + _STREAM.encode()
    decoder = Decoder()
    pieces = [wire[i : i + size] for i in range(0, len(wire), size)]
    assert [e for piece in pieces for e in decoder.feed(piece)] == _EVENTS


def test_a_carriage_return_ends_an_event_at_once():
    assert list(Decoder().feed(b"data: x\r\r")) == [ServerSentEvent("message", "x")]


@pytest.mark.parametrize("data", ["", "one", "two\nlines", "cr\rlf\r\nend\n", "北京 \u2028 stays"])
def test_what_is_encoded_is_decoded(data):
    (event,) = Decoder().feed(encode("name", data))
    assert event == ServerSentEvent("name", data.replace("\r\n", "\n").replace("\r", "\n"))


def test_both_clients_offer_the_same():
    def surface(kind):
        methods = {n: f for n, f in vars(kind).items() if not n.startswith("_") and n not in ("close", "aclose")}
        return {n: list(inspect.signature(f).parameters) for n, f in methods.items()}

    assert surface(Client) == surface(AsyncClient)


def test_one_client_serves_many_threads(engine):
    answers = []
    with serving(engine) as url, Client(url, KEY) as client:
        ask = lambda n: answers.append(client.query(f"question {n}").text)  # noqa: E731
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == sorted(f"question {n}" for n in range(20))


def test_the_sdk_and_the_server_import_no_torch():
    program = "import sys, json, ragkv.client, ragkv.server; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout
    loaded = set(json.loads(output))
    assert not loaded & {"torch", "transformers"}
    program = program.replace(", ragkv.server", "")
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout
    assert not set(json.loads(output)) & {"torch", "transformers", "fastapi", "faiss", "sklearn"}


def test_a_request_is_reached_by_its_id(client, engine):
    request_id = client.query("who was it", session_id="s-1", priority=4).id
    assert (engine.requests[0].session_id, engine.requests[0].priority) == ("s-1", 4)
    client.reprioritize(request_id, -1)
    assert engine.priorities == {request_id: -1}
    client.cancel(request_id)
    assert engine.finish_reason == "cancelled"
    for call in (lambda: client.cancel("q-2"), lambda: client.reprioritize("q-2", 1)):
        with pytest.raises(errors.NotFoundError):
            call()
