"""POST /v1/query: JSON, server-sent events, errors before and in mid-stream, hang-ups."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import httpx
import pytest

from ragkv.errors import (
    CancelledError,
    EngineClosedError,
    InputError,
    PromptTooLongError,
    QueueFullError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from ragkv.server import create_app, events
from ragkv.sse import Decoder
from ragkv.types import Answer
from tests.fake_engine import FakeEngine, HangUp, local, serving, wait_for

pytestmark = pytest.mark.anyio
QUESTION = {"question": "who was it"}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    return FakeEngine()


async def ask(engine, body, **headers):
    async with local(engine) as http:
        return await http.post("/v1/query", json=body, headers=headers)


def decoded(response):
    return [(e.name, json.loads(e.data)) for e in Decoder().feed(response.content)]


async def test_a_json_query_is_answered_with_an_answer(engine):
    response = await ask(engine, {**QUESTION, "top_k": 3, "seed": 2**63 - 1})
    assert response.status_code == 200
    assert Answer.model_validate(response.json()).text == "who was it"
    assert engine.requests[0].model_fields_set == {"question", "top_k", "seed"}


@pytest.mark.parametrize(
    ("body", "headers"), [({**QUESTION, "stream": True}, {}), (QUESTION, {"accept": "text/event-stream"})]
)
async def test_a_streamed_query_gives_sources_tokens_and_done(engine, body, headers):
    response = await ask(engine, body, **headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    names = [name for name, _ in decoded(response)]
    assert names == ["sources", "token", "token", "token", "done"]
    data = [data for _, data in decoded(response)]
    assert "".join(d["text"] for d in data[1:-1]) == "who was it" == data[-1]["answer"]["text"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x"), 422),
        (PromptTooLongError("x", limit=5), 422),
        (QueueFullError("x"), 429),
        (StoreFullError("x"), 507),
        (StoreReadOnlyError("x"), 503),
        (StoreError("x"), 503),
        (EngineClosedError("x"), 503),
        (CancelledError("x"), 499),
    ],
)
async def test_an_error_before_the_first_event_is_an_http_error(engine, error, status, stream):
    engine.fail = error
    response = await ask(engine, {**QUESTION, "stream": stream})
    assert response.status_code == status
    assert response.json() == {"error": {"code": error.code, "message": "x", "context": error.context}}
    assert ("retry-after" in response.headers) == (status == 429)


async def test_an_unknown_collection_is_404_also_for_a_stream(engine):
    response = await ask(engine, {**QUESTION, "collection": "nope", "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_an_unexpected_error_is_500_without_its_text(engine, caplog):
    engine.fail = RuntimeError("the secret")
    response = await ask(engine, QUESTION)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text
    assert "the secret" in caplog.text


async def test_a_failure_in_mid_stream_is_the_last_event(engine):
    engine.fail_after = (1, StoreError("the disk went away", path="p"))
    response = await ask(engine, {**QUESTION, "stream": True})
    assert response.status_code == 200
    assert decoded(response)[-1] == (
        "error",
        {"error": {"code": "store", "message": "the disk went away", "context": {"path": "p"}}},
    )


async def test_an_unexpected_failure_in_mid_stream_tells_nothing(engine, caplog):
    engine.fail_after = (1, RuntimeError("the secret"))
    response = await ask(engine, {**QUESTION, "stream": True})
    assert decoded(response)[-1][1]["error"]["code"] == "internal"
    assert "secret" not in response.text
    assert "the secret" in caplog.text


async def test_silence_is_bridged_by_comments(engine, monkeypatch):
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.01)
    engine.pace = 0.05
    response = await ask(engine, {**QUESTION, "stream": True})
    assert response.text.count(": keep-alive") >= 2
    assert [name for name, _ in decoded(response)][-1] == "done"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "question"),
        ({"question": ""}, "question"),
        ({**QUESTION, "top_k": 0}, "top_k"),
        ({**QUESTION, "temprature": 1}, "temprature"),
        ({**QUESTION, "history": [{"role": "system", "content": "x"}]}, "history.0.role"),
        ({**QUESTION, "documents": [{"id": "a"}]}, "documents.0.text"),
    ],
)
async def test_a_validation_error_names_the_field(engine, body, field):
    response = await ask(engine, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "input")
    assert error["message"].startswith(f"{field}: ")
    assert error["context"]["errors"][0]["field"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"question": "\xff"}',
        b'{"question": "\\ud800"}',
        b'{"question": "x", "ratio": NaN}',
        b'{"question": "x", "filters": {"a": Infinity}}',
        b'{"question": "x", "filters": {"a": [1e999]}}',
        b'{"question": "x", "filters": {"a": 1' + b"0" * 30 + b"}}",
        b'{"question": "x", "filters": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
        b"[]",
        b'"x"',
    ],
)
async def test_bytes_that_are_no_sound_json_object_are_422(engine, body):
    async with local(engine) as http:
        response = await http.post("/v1/query", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "input"
    assert engine.requests == []


async def test_a_body_without_json_content_type_is_told_which_to_send(engine):
    async with local(engine) as http:
        response = await http.post("/v1/query", content=b'{"question": "x"}')
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_413(announced):
    engine = FakeEngine(max_document_bytes=1000)

    async def pieces():
        yield b'{"question": "'
        for _ in range(100):
            yield b"x" * 1000

    body = json.dumps({"question": "x" * 5000}) if announced else pieces()
    async with local(engine) as http:
        response = await http.post("/v1/query", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["context"]["limit"] == 4000


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (True, 0), (True, 1), (True, 3)])
async def test_a_client_that_hangs_up_stops_the_generation(engine, stream, after):
    engine.endless, engine.pace = True, 0.001
    engine.think = 0 if after else 60
    client = HangUp({**QUESTION, "stream": stream}, after)
    async with asyncio.timeout(5):
        await create_app(engine)(client.scope("/v1/query"), client.receive, client.send)
    assert engine.cancelled.is_set() or not engine.started.is_set()
    assert client.messages[0]["status"] == (200 if after else 499)


@pytest.mark.parametrize("stream", [False, True])
def test_closing_a_real_connection_stops_the_generation(engine, stream):
    engine.endless, engine.pace = True, 0.005
    with serving(engine) as url:
        address = httpx.URL(url)
        body = json.dumps({**QUESTION, "stream": stream}).encode()
        with contextlib.closing(socket.create_connection((address.host, address.port))) as connection:
            head = f"Host: {address.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(f"POST /v1/query HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            if stream:
                assert b"200 OK" in connection.recv(4096)
            assert wait_for(engine.started)
            assert not engine.cancelled.is_set()
        assert wait_for(engine.cancelled)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
