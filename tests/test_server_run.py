"""Binding, and serving until a signal."""

from __future__ import annotations

import gc
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ragkv.client import Client
from ragkv.errors import ConfigError, EngineClosedError
from ragkv.server import bind, serve, url_of
from tests.fake_engine import KEY, FakeEngine, serving, settings

ROOT = Path(__file__).parents[1]

PROGRAM = """
from ragkv.server import bind, serve
from tests.fake_engine import FakeEngine
engine = FakeEngine()
engine.endless, engine.pace = True, 0.01
serve(bind(engine.settings), engine)
print("closed the engine", flush=True)
"""


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with bind(settings()) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use; pass --port"):
            bind(settings(port=port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_only_let_in_with_a_key(host):
    with pytest.raises(ConfigError, match="api_key") as caught:
        bind(settings(host=host))
    assert caught.value.context["setting"] == "api_key"


def test_with_a_key_any_address_can_be_bound():
    with bind(settings(host="0.0.0.0", api_key=KEY)) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "", "192.0.2.1"])
def test_a_host_that_is_not_ours_names_the_setting(host):
    with pytest.raises(ConfigError) as caught:
        bind(settings(host=host, api_key=KEY))
    assert caught.value.context["setting"] == "host"


def test_the_url_is_the_one_bound():
    with bind(settings(host="localhost")) as sock:
        assert sock.getsockname()[1] > 0
        assert url_of(sock).endswith(f":{sock.getsockname()[1]}")


def test_collections_leave_what_was_loaded_alone_while_serving():
    frozen = []

    def announce(url):
        frozen.append(gc.get_freeze_count())
        signal.raise_signal(signal.SIGTERM)

    engine = FakeEngine()
    serve(bind(engine.settings), engine, announce=announce)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_and_returns_to_the_caller(number):
    program = PROGRAM.replace("import bind", "import run, bind").replace(
        "engine =", "run.GRACE_SECONDS = 1\nengine =", 1
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().split()[-1]
        with Client(url) as client:
            events = client.stream("go on")
            assert next(events).type == "sources"
            process.send_signal(number)
            with pytest.raises(EngineClosedError, match="ask again"):
                list(events)
        assert process.stdout.read() == "closed the engine\n"
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def test_a_large_refused_upload_still_gets_its_answer(tmp_path):
    engine = FakeEngine(max_document_bytes=1000)
    (tmp_path / "big.txt").write_bytes(b"x" * 8_000_000)
    with serving(engine) as url, (tmp_path / "big.txt").open("rb") as file:
        response = httpx.post(f"{url}/v1/collections/c/documents", files={"files": file}, trust_env=False)
        assert response.status_code == 413


def test_a_connection_that_sends_nothing_keeps_nobody_waiting():
    with serving(FakeEngine()) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)):
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
