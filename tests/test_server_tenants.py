"""Tenants: whose key opens what, whose requests are whose, and what /metrics tells of each."""

from __future__ import annotations

import asyncio
import json

import pytest

from ragkv.errors import ConfigError
from ragkv.server import bind, create_app
from ragkv.sse import Decoder
from tests.fake_engine import KEY, FakeEngine, local, settings

pytestmark = pytest.mark.anyio
ANN, BOB = "the-key-of-ann", "the-key-of-bob"
TENANTS = {"ann": {"key": ANN, "weight": 2.0}, "bob": {"key": BOB}}
QUESTION = {"question": "who was it"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "who"}]}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    return FakeEngine(api_key=KEY, tenants=TENANTS)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


async def test_the_key_says_whose_a_request_is(engine):
    async with local(engine) as http:
        for key in (ANN, BOB, KEY):
            for body, path in ((QUESTION, "/v1/query"), (CHAT, "/v1/chat/completions")):
                for stream in (False, True):
                    sent = await http.post(path, json=body | {"stream": stream}, headers=bearer(key))
                    assert sent.status_code == 200
    assert engine.tenants == ["ann"] * 4 + ["bob"] * 4 + [""] * 4


@pytest.mark.parametrize("key", ["", "the-key-of-an", ANN + "x", "ann", "another-key"])
async def test_another_key_is_401_in_the_form_of_the_route(engine, key):
    async with local(engine, headers=bearer(key)) as http:
        assert (await http.get("/v1/collections")).json()["error"]["code"] == "unauthorized"
        refused = await http.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert engine.requests == []


ADMIN = [
    ("GET", "/v1/cache"),
    ("DELETE", "/v1/cache"),
    ("POST", "/v1/cache/check"),
    ("POST", "/v1/collections/c/documents"),
    ("DELETE", "/v1/collections/c/documents/a"),
    ("DELETE", "/v1/collections/c"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN)
@pytest.mark.parametrize("admin", [KEY, None])
async def test_what_concerns_all_tenants_needs_the_api_key(method, path, admin):
    engine = FakeEngine(api_key=admin, tenants=TENANTS)
    body = {"json": {"documents": [{"id": "a", "text": "A"}]}} if path.endswith("documents") else {}
    async with local(engine) as http:
        refused = await http.request(method, path, headers=bearer(ANN), **body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        if admin is not None:
            assert (await http.request(method, path, headers=bearer(admin), **body)).status_code in (200, 204, 404)
    assert (engine.store != {}) == (admin is not None and method == "POST" and path.endswith("documents"))


async def test_tenants_read_the_shared_collections(engine):
    async with local(engine) as http:
        documents = {"documents": [{"id": "a", "text": "A"}]}
        await http.post("/v1/collections/c/documents", json=documents, headers=bearer(KEY))
        for key in (ANN, BOB):
            assert (await http.get("/v1/collections/c/documents/a", headers=bearer(key))).json()["text"] == "A"


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_tenants_keys_are_keys_enough_to_bind_any_address(host):
    bind(settings(host=host, tenants=TENANTS)).close()


async def test_with_tenants_only_their_keys_are_asked_for_not_where_from():
    engine = FakeEngine(tenants=TENANTS)
    async with local(engine, headers={"host": "other.example"}) as http:
        assert (await http.post("/v1/query", json=QUESTION)).status_code == 401
        assert (await http.post("/v1/query", json=QUESTION, headers=bearer(BOB))).status_code == 200
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "tenants", [{"ann": {"key": ANN}, "bob": {"key": ANN}}, {"ann": {"key": KEY}}, {"": {"key": ANN}}]
)
def test_keys_that_tell_nobody_apart_are_refused_at_start(tenants):
    with pytest.raises(ConfigError) as caught:
        bind(settings(api_key=KEY, tenants=tenants))
    assert caught.value.context["setting"] == "tenants"
    assert ANN not in str(caught.value)


async def begin(http, engine, key):
    """A stream of its own task, once the engine has begun with it."""
    task = asyncio.create_task(http.post("/v1/query", json=QUESTION | {"stream": True}, headers=bearer(key)))
    while not engine.started.is_set():
        await asyncio.sleep(0.001)
    return task


async def test_only_its_tenant_reaches_a_request(engine):
    engine.endless, engine.pace = True, 0.001
    async with local(engine) as http:
        task = await begin(http, engine, ANN)
        for key in (BOB, KEY):
            patched = await http.patch("/v1/requests/q-1", json={"priority": 5}, headers=bearer(key))
            assert (patched.status_code, patched.json()["error"]["code"]) == (404, "not_found")
            assert (await http.delete("/v1/requests/q-1", headers=bearer(key))).status_code == 404
        assert engine.priorities == {}
        patched = await http.patch("/v1/requests/q-1", json={"priority": -5}, headers=bearer(ANN))
        assert patched.json() == {"id": "q-1", "priority": -5}
        assert engine.priorities == {"q-1": -5}
        assert (await http.delete("/v1/requests/q-1", headers=bearer(ANN))).status_code == 204
        async with asyncio.timeout(5):
            events = list(Decoder().feed((await task).content))
    assert json.loads(events[-1].data)["answer"]["finish_reason"] == "cancelled"


@pytest.mark.parametrize("body", [{}, {"priority": 1001}, {"priority": "high"}, {"priority": 1, "weight": 2}])
async def test_a_bad_priority_is_422(engine, body):
    async with local(engine, headers=bearer(ANN)) as http:
        assert (await http.patch("/v1/requests/q-1", json=body)).status_code == 422


async def test_metrics_tell_tenants_apart_and_never_their_keys(engine):
    async with local(engine) as http:
        for key in (ANN, ANN, KEY):
            await http.post("/v1/chat/completions", json=CHAT | {"stream": key == ANN}, headers=bearer(key))
        await http.post("/v1/query", json=QUESTION, headers=bearer(BOB))
        text = (await http.get("/metrics")).text
    lines = set(text.splitlines())
    for name in ("ttft_seconds", "queue_seconds", "preemptions"):
        assert {f'ragkv_{name}_count{{tenant="{t}"}} {n}.0' for t, n in (("ann", 2), ("bob", 1), ("", 1))} <= lines
    # Three pieces of text are two times between them; one piece is none.
    assert 'ragkv_tbt_seconds_count{tenant="bob"} 2.0' in lines
    assert 'ragkv_tbt_seconds_count{tenant="ann"}' not in text
    assert {'ragkv_tenant_service{tenant="ann"} 20.0', 'ragkv_tenant_service{tenant="bob"} 10.0'} <= lines
    assert not any(key in text for key in (ANN, BOB, KEY))


def test_the_description_tells_that_a_key_is_needed():
    assert create_app(FakeEngine(tenants=TENANTS)).openapi()["security"] == [{"key": []}]
