"""Who may ask: bearer key, admin routes, forged requests; and the routes around the answers."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from ragkv import errors
from ragkv.server import create_app, routes_health
from ragkv.server.errors import STATUS, status_of
from ragkv.server.metrics import Metrics
from tests.fake_engine import KEY, FakeEngine, local

pytestmark = pytest.mark.anyio
DOCS = Path(__file__).parents[1] / "docs" / "rest.md"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def get(engine, path, method="GET", **headers):
    async with local(engine) as http:
        return await http.request(method, path, headers=headers)


@pytest.mark.parametrize("path", ["/v1/collections", "/v1/query", "/v1/cache", "/v1/nothing", "/elsewhere"])
@pytest.mark.parametrize("sent", [None, "", KEY, "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"])
async def test_without_the_key_every_route_is_401(path, sent):
    headers = {} if sent is None else {"authorization": sent.encode()}
    response = await get(FakeEngine(api_key=KEY), path, **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "unauthorized"


async def test_the_key_opens_every_route_and_admin():
    engine = FakeEngine(api_key=KEY)
    async with local(engine, headers={**BEARER, "host": "other.example"}) as http:
        assert (await http.get("/v1/collections")).status_code == 200
        assert (await http.get("/v1/cache")).json()["entries"] == 3
        assert (await http.post("/v1/cache/check")).json()["fixed"] is False
        assert (await http.post("/v1/cache/check", json={"fix": True})).json()["fixed"] is True
        assert (await http.post("/v1/cache/check", json={"fox": True})).status_code == 422
        assert (await http.delete("/v1/cache")).json() == {"removed": 3}
    assert engine.fixed == [False, True]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json"])
async def test_probes_stay_open(path):
    assert (await get(FakeEngine(api_key=KEY), path)).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/check")])
async def test_admin_routes_need_a_configured_key(method, path):
    response = await get(FakeEngine(), f"/v1/cache{path}", method, **BEARER)
    assert response.status_code == 403
    assert "RAGKV_API_KEY" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example:8377"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1:8377", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1:8377", "origin": "null"}, 403),
        ({"host": "127.0.0.1:8377", "origin": "http://localhost:3000"}, 200),
        ({"host": "[::1]:8377"}, 200),
        ({"host": "LOCALHOST"}, 200),
    ],
)
async def test_a_web_page_cannot_use_a_server_without_a_key(headers, status):
    assert (await get(FakeEngine(), "/v1/collections", **headers)).status_code == status


async def test_health_is_503_once_the_engine_has_failed():
    engine = FakeEngine()
    assert (await get(engine, "/health")).json()["status"] == "ok"
    engine.status = "failed"
    response = await get(engine, "/health")
    assert (response.status_code, response.json()["status"]) == (503, "failed")


async def test_health_of_an_engine_that_hangs_is_503_in_time(monkeypatch):
    monkeypatch.setattr(routes_health, "PROBE_SECONDS", 0.05)
    engine = FakeEngine()
    engine.hung.clear()
    try:
        async with asyncio.timeout(5):
            response = await get(engine, "/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server")
    finally:
        engine.hung.set()


async def test_metrics_count_requests_queries_and_the_engines_numbers():
    engine = FakeEngine()
    async with local(engine) as http:
        await http.post("/v1/query", json={"question": "a b"})
        await http.post("/v1/query", json={"question": "a b", "stream": True})
        await http.post("/v1/query", json={})
        await http.get("/v1/collections/x/documents/a/b")
        await http.get("/nowhere/special")
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = set(response.text.splitlines())
    assert 'ragkv_http_requests_total{method="POST",route="/v1/query",status="200"} 2.0' in lines
    assert 'ragkv_http_requests_total{method="POST",route="/v1/query",status="422"} 1.0' in lines
    route = "/v1/collections/{collection}/documents/{document_id:path}"
    assert f'ragkv_http_requests_total{{method="GET",route="{route}",status="404"}} 1.0' in lines
    assert 'ragkv_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in lines
    assert 'ragkv_ttft_seconds_count{tenant=""} 2.0' in lines
    assert 'ragkv_ttft_seconds_sum{tenant=""} 0.5' in lines
    assert "ragkv_recomputed_share_sum 0.2" in lines
    assert {f'ragkv_chunks_total{{kv="{kv}"}} 2.0' for kv in ("ram", "ssd", "computed", "dropped")} <= lines
    assert 'ragkv_tokens_total{kind="cached"} 18.0' in lines
    assert 'ragkv_queue_seconds_sum{tenant=""} 0.5' in lines
    assert 'ragkv_tbt_seconds_count{tenant=""} 2.0' in lines
    assert 'ragkv_preemptions_sum{tenant=""} 2.0' in lines
    assert 'ragkv_tenant_service{tenant=""} 20.0' in lines
    assert {"ragkv_engine_store_bytes 4096.0", "ragkv_engine_queued 2.0"} <= lines
    assert "special" not in response.text


async def test_unknown_routes_and_methods_have_the_error_body():
    engine = FakeEngine()
    response = await get(engine, "/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "no_route")
    response = await get(engine, "/v1/query")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert (await get(engine, "/docs")).status_code == 404


async def test_openapi_describes_the_bodies():
    schema = (await get(FakeEngine(api_key=KEY), "/openapi.json")).json()
    schemas = schema["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", str(schema))) <= set(schemas)
    assert schemas["DocumentsBody"]["properties"]["documents"]["items"]["title"] == "DocumentIn"
    assert "stream" in schemas["QueryBody"]["properties"]
    assert schema["security"] == [{"key": []}]


def test_only_the_servers_own_faults_are_500():
    def classes(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from classes(child)

    ours = [kind for kind in classes(errors.RagkvError) if kind.__module__ == errors.__name__]
    assert {kind for kind in ours if status_of(kind("x")) == 500} == {errors.RagkvError, errors.ConfigError}


def routes():
    app = create_app(FakeEngine())
    schema = app.openapi()
    return [(method.upper(), path) for path, item in schema["paths"].items() for method in item]


def test_every_route_is_documented():
    text = DOCS.read_text()
    listed = routes()
    assert len(listed) == 17
    for method, path in listed:
        assert f"`{method} {path}`" in text, f"{method} {path} is not in docs/rest.md"


def test_every_error_status_and_metric_is_documented():
    text = DOCS.read_text()
    for code in {kind.code for kind in STATUS}:
        assert f"`{code}`" in text
    exposition = Metrics().render({}, {}).decode()
    for name in re.findall(r"^# TYPE (\w+) (?!gauge)", exposition, re.M):
        assert f"`{name}`" in text
