"""The chat route over the real engine and the bundled model, asked through the official client."""

from __future__ import annotations

import asyncio

import httpx2
import openai
import pytest

from ragkv.paged import BLOCK_TOKENS
from ragkv.server import create_app
from tests.engine_kit import eventually, wait_idle
from tests.fake_engine import HangUp

pytestmark = pytest.mark.anyio
DOCUMENTS = [
    "Dorvane Works was founded by Tessaly Broom in the town of Quill. " * 4,
    "Tessaly Broom was born in Farrow and studied glass making there. " * 4,
]
TENANTS = {"ann": {"key": "the-key-of-ann"}, "bob": {"key": "the-key-of-bob"}}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine(make_engine):
    return make_engine(model="bundled", tenants=TENANTS)


def official(engine, key="the-key-of-ann"):
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(engine)))
    return openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key=key, http_client=http, max_retries=0)


async def turn(client, messages, session_id="s-1"):
    """A streamed answer: its text, how it finished, its usage, and ragkv's report."""
    stream = await client.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"session_id": session_id, "documents": DOCUMENTS},
    )
    *chunks, last = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, last.usage, chunks[-1].model_extra["ragkv"]


async def test_a_later_turn_of_a_session_computes_only_what_is_new(engine):
    first = [{"role": "user", "content": "Who founded Dorvane Works?"}]
    async with official(engine) as client:
        text, finished, usage, report = await turn(client, first)
        assert finished in ("stop", "length")
        assert "prefix" not in {chunk["kv"] for chunk in report["chunks"]}
        assert 0 < usage.completion_tokens <= 8
        more = [{"role": "assistant", "content": text}, {"role": "user", "content": "Where was she born?"}]
        _, _, later, report = await turn(client, first + more)
    details = later.prompt_tokens_details
    # What is shared is whole blocks.
    assert 0 < usage.prompt_tokens - BLOCK_TOKENS < details.cached_tokens < later.prompt_tokens
    assert {chunk["kv"] for chunk in report["chunks"]} == {"prefix"}
    assert engine.tenant_service().keys() == {"ann"}


async def test_streamed_or_not_the_answer_is_the_same(engine):
    ask = {
        "model": "default",
        "messages": [{"role": "user", "content": "Who founded Dorvane Works?"}],
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"documents": DOCUMENTS, "method": "full"},
    }
    async with official(engine) as client:
        whole = await client.chat.completions.create(**ask)
        chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) <= whole.usage.completion_tokens
    assert [token.token for token in tokens] == [
        token.token for choice in choices if choice.logprobs for token in choice.logprobs.content
    ]
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_frees_the_request(engine, stream):
    ask = {
        "model": "default",
        "messages": [{"role": "user", "content": "Who founded Dorvane Works?"}],
        "max_tokens": 400,
        "documents": DOCUMENTS,
        "stream": stream,
    }
    client = HangUp(ask, 2 if stream else 0)
    scope = client.scope("/v1/chat/completions")
    scope["headers"].append((b"authorization", b"Bearer the-key-of-bob"))
    async with asyncio.timeout(30):
        await create_app(engine)(scope, client.receive, client.send)
        await asyncio.to_thread(wait_idle, engine)


async def test_all_who_hang_up_in_mid_stream_at_once_are_freed(engine):
    headers = (b"authorization", b"Bearer the-key-of-bob")
    clients, app = [], create_app(engine)
    for number in range(50):
        ask = {"question": f"Who is number {number}?", "max_tokens": 2000, "temperature": 10.0, "stream": True}
        clients.append(HangUp(ask, 3))
    scopes = [client.scope("/v1/query") for client in clients]
    for scope in scopes:
        scope["headers"].append(headers)
    async with asyncio.timeout(60):
        await asyncio.gather(*(app(s, c.receive, c.send) for s, c in zip(scopes, clients, strict=True)))
        assert {client.messages[0]["status"] for client in clients} == {200}
        await asyncio.to_thread(wait_idle, engine)
    stats = engine.metrics()
    assert stats["tokens"] < 50 * 100

    def nobody_holds_a_block() -> bool:
        stats = engine.metrics()
        return stats["pool_free_blocks"] + stats["pool_idle_blocks"] == stats["pool_blocks"]

    await asyncio.to_thread(eventually, nobody_holds_a_block)  # the last may still be being copied


async def test_a_full_queue_is_429_and_when_to_come_back(make_engine):
    engine = make_engine(model="bundled", max_queued_tokens=1, max_running=1)
    async with official(engine) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await asyncio.gather(
                *(turn(client, [{"role": "user", "content": f"Who is {n}?"}], f"s-{n}") for n in range(8))
            )
    assert caught.value.response.headers["retry-after"] == "1"
    wait_idle(engine)
