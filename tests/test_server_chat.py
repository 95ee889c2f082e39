"""POST /v1/chat/completions and /v1/models: the official client, refusals by name, errors, hang-ups."""

from __future__ import annotations

import asyncio
import json

import httpx2
import openai
import pytest

from ragkv.errors import NotFoundError, PromptTooLongError, QueueFullError, StoreError
from ragkv.server import create_app
from ragkv.types import ChatMessage, DocumentIn
from tests.fake_engine import KEY, FakeEngine, HangUp, local, serving

pytestmark = pytest.mark.anyio
ASK = {"model": "fake", "messages": [{"role": "user", "content": "who was it"}]}
PATH = "/v1/chat/completions"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    return FakeEngine()


def official(engine, key="unused"):
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(engine)))
    return openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key=key, http_client=http, max_retries=0)


async def ask(engine, **fields):
    async with local(engine) as http:
        return await http.post(PATH, json=ASK | fields)


def lines(response):
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


async def test_the_official_client_gets_an_answer(engine):
    async with official(engine) as client:
        answer = await client.chat.completions.create(**ASK)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "who was it", "stop")
    assert (answer.object, answer.model, answer.id) == ("chat.completion", "fake", "q-1")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (20, 2, 22)
    assert usage.prompt_tokens_details.cached_tokens == 9
    assert choice.logprobs is None
    report = answer.model_extra["ragkv"]
    assert [chunk["kv"] for chunk in report["chunks"]] == ["ram", "ssd", "computed", "dropped"]
    assert [source["document_id"] for source in report["sources"]] == ["d", "d", "d"]
    assert report["timing"]["ttft_ms"] == 250.0


@pytest.mark.parametrize("usage", [False, True])
async def test_the_official_client_streams(engine, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    async with official(engine) as client:
        stream = await client.chat.completions.create(**ASK, stream=True, **options)
        chunks = [chunk async for chunk in stream]
    if usage:
        last = chunks.pop()
        assert (last.choices, last.usage.total_tokens) == ([], 22)
        assert last.usage.prompt_tokens_details.cached_tokens == 9
    assert {(chunk.id, chunk.object, chunk.usage) for chunk in chunks} == {("q-1", "chat.completion.chunk", None)}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "who was it"
    assert chunks[-1].model_extra["ragkv"]["timing"]["ttft_ms"] == 250.0


async def test_a_stream_is_data_lines_up_to_done(engine):
    response = await ask(engine, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = lines(response)
    assert done == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_the_official_client_over_a_real_socket():
    engine = FakeEngine(api_key=KEY)
    with serving(engine) as url:
        http = httpx2.Client(trust_env=False)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=http) as client:
            stream = client.chat.completions.create(**ASK, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "who was it"
            assert [model.id for model in client.models.list()] == ["fake"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", http_client=httpx2.Client()) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.chat.completions.create(**ASK)
            assert caught.value.code == "invalid_api_key"


async def test_every_field_arrives_under_the_engines_name(engine):
    extras = {
        "documents": ["first", {"text": "second", "id": "s", "metadata": {"a": None}}],
        "method": "links",
        "ratio": 0.2,
        "session_id": "s-1",
        "priority": -3,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    async with official(engine) as client:
        await client.chat.completions.create(
            **ASK, max_completion_tokens=7, temperature=0.5, top_p=0.9, stop="end", seed=3, presence_penalty=0.1,
            frequency_penalty=-0.1, logprobs=True, top_logprobs=2, user="u", extra_body=extras
        )  # fmt: skip
    request = engine.requests[0]
    assert request.documents == [DocumentIn(text="first"), DocumentIn(text="second", id="s", metadata={"a": None})]
    sent = request.model_dump(exclude={"documents", "messages"}, exclude_unset=True)
    assert sent == {
        "method": "links", "ratio": 0.2, "session_id": "s-1", "priority": -3, "top_k_tokens": 40, "min_p": 0.05,
        "repetition_penalty": 1.1, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["end"], "seed": 3,
        "presence_penalty": 0.1, "frequency_penalty": -0.1, "logprobs": 2,
    }  # fmt: skip


async def test_retrieval_is_asked_for_by_other_names(engine):
    engine.store["c"] = {}
    await ask(engine, collection="c", filters={"year": None}, rag_top_k=3, max_tokens=5, stop=["a", "b"])
    sent = engine.requests[0].model_dump(exclude={"messages"}, exclude_unset=True)
    assert sent == {
        "collection": "c", "filters": {"year": None}, "top_k": 3, "max_tokens": 5, "stop": ["a", "b"],
        "temperature": 1.0,
    }  # fmt: skip


async def test_system_messages_are_joined_in_front_and_parts_are_text(engine):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "a", "name": "ann"},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    assert (await ask(engine, messages=messages)).status_code == 200
    assert engine.requests[0].messages == [
        ChatMessage(role="system", content="be brief\n\nbe\nkind"),
        ChatMessage(role="user", content="a"),
        ChatMessage(role="assistant", content="b"),
        ChatMessage(role="user", content="c"),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "logit_bias": {}, "store": False},
        {"response_format": {"type": "text"}, "service_tier": "auto", "reasoning_effort": None, "modalities": ["text"]},
        {"temperature": None, "stop": None, "seed": None, "stream": None, "stream_options": None, "documents": None},
        {"model": "default", "safety_identifier": "x", "prompt_cache_key": "x", "top_logprobs": None},
    ],
)
async def test_what_asks_for_nothing_is_taken(engine, fields):
    assert (await ask(engine, **fields)).status_code == 200
    assert engine.requests[0].model_dump(exclude={"messages"}, exclude_unset=True) == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"unheard_of": None}, "unheard_of"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"rag_top_k": 0}, "rag_top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"priority": 1001}, "priority"),
        ({"session_id": ""}, "session_id"),
        ({"method": "magic"}, "method"),
        ({"documents": [{"id": "a"}]}, "documents.0.text"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(engine, fields, param):
    response = await ask(engine, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(f"{param}: ")
    assert set(error) == {"message", "type", "param", "code"}
    assert engine.requests == []


async def test_a_missing_model_or_conversation_is_refused_by_name(engine):
    async with local(engine) as http:
        response = await http.post(PATH, json={})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "model: Field required; messages: Field required"


async def test_an_image_is_told_what_it_is(engine):
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    response = await ask(engine, messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])
    assert "'image_url'; this server reads text parts only" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "status", "code"),
    [
        (QueueFullError("x"), openai.RateLimitError, 429, "rate_limit_exceeded"),
        (PromptTooLongError("x", limit=5), openai.BadRequestError, 400, "context_length_exceeded"),
        (NotFoundError("x"), openai.NotFoundError, 404, "not_found"),
        (StoreError("x"), openai.InternalServerError, 503, "store"),
        (RuntimeError("the secret"), openai.InternalServerError, 500, "internal"),
    ],
)
async def test_errors_of_the_engine_are_those_of_the_official_client(engine, error, kind, status, code, stream):
    engine.fail = error
    async with official(engine) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**ASK, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in caught.value.response.text
    assert caught.value.response.headers.get("retry-after") == ("1" if status == 429 else None)


async def test_another_model_is_not_found(engine):
    async with official(engine) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(**ASK | {"model": "gpt-9"})
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert "'fake'" in caught.value.message
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/other")
        assert (await client.models.retrieve("fake")).owned_by == "ragkv"
        assert (await client.models.retrieve("default")).id == "fake"
    assert engine.requests == []


@pytest.mark.parametrize(("method", "path", "status"), [("GET", PATH, 405), ("POST", "/v1/chat/nothing", 404)])
async def test_the_frameworks_own_errors_have_openais_form_there(engine, method, path, status):
    async with local(engine) as http:
        response = await http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_failure_in_mid_stream_is_the_last_line(engine):
    engine.fail_after = (1, StoreError("the disk went away"))
    response = await ask(engine, stream=True)
    error = json.loads(lines(response)[-1])["error"]
    assert error == {"message": "the disk went away", "type": "server_error", "param": None, "code": "store"}
    async with official(engine) as client:
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError, match="the disk went away"):
            [chunk async for chunk in stream]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_is_no_answer(engine, stream):
    engine.finish_reason = "cancelled"
    response = await ask(engine, stream=stream)
    told = json.loads(lines(response)[-1]) if stream else response.json()
    assert told["error"]["code"] == "cancelled"
    assert response.status_code == (200 if stream else 499)


@pytest.mark.parametrize("asked", [0, 2])
async def test_log_probabilities_have_openais_shape(engine, asked):
    answer = (await ask(engine, logprobs=True, top_logprobs=asked)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["who", " was", " it"]
    assert content[1]["bytes"] == list(b" was")
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [-2.0, -3.0][:asked]
    response = await ask(engine, logprobs=True, top_logprobs=asked, stream=True)
    choices = [json.loads(line)["choices"][0] for line in lines(response)[:-1]]
    assert [c["logprobs"]["content"][0] for c in choices if c["logprobs"]] == content


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (True, 0), (True, 1), (True, 3)])
async def test_a_client_that_hangs_up_stops_the_generation(engine, stream, after):
    engine.endless, engine.pace = True, 0.001
    engine.think = 0 if after else 60
    client = HangUp(ASK | {"stream": stream}, after)
    async with asyncio.timeout(5):
        await create_app(engine)(client.scope(PATH), client.receive, client.send)
    assert engine.cancelled.is_set() or not engine.started.is_set()
    assert client.messages[0]["status"] == (200 if after else 499)
