"""The whole house at once: a real engine behind a real server, asked through the SDK."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from ragkv.client import Client
from ragkv.errors import DocumentError, InputError, NotFoundError, PromptTooLongError
from ragkv.eval.replay import check_report
from ragkv.server.run import server_for
from ragkv.types import DoneEvent, SourcesEvent, TokenEvent

DOCUMENTS = [
    {
        "id": f"people/{i}",
        "title": f"Person {i}",
        "text": f"Person {i} was born in town {i}. " * 6 + f"\n\nShe works for company {i}. " * 6,
        "metadata": {"group": i % 2},
    }
    for i in range(6)
]
QUESTION = "Where was person 3 born?"


@pytest.fixture
def client(engine):
    sock = socket.create_server(("127.0.0.1", 0))
    server = server_for(engine, announce=lambda url: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    with Client(f"http://127.0.0.1:{sock.getsockname()[1]}") as client:
        yield client
    server.should_exit = True
    thread.join()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_documents_in_answer_out(client):
    report = client.add_documents("people", DOCUMENTS)
    assert (report.added, report.encoded) == (6, report.chunks)
    events = list(client.stream(QUESTION, collection="people", top_k=4))
    assert isinstance(events[0], SourcesEvent)
    assert isinstance(events[-1], DoneEvent)
    answer = events[-1].answer
    assert check_report(answer, "".join(e.text for e in events if isinstance(e, TokenEvent))) == []
    assert [chunk.kv for chunk in answer.chunks] == ["ssd"] * 4
    again = client.query(QUESTION, collection="people", top_k=4)
    assert again.text == answer.text
    assert [chunk.kv for chunk in again.chunks] == ["ram"] * 4


def test_the_same_documents_twice_compute_nothing(client):
    client.add_documents("people", DOCUMENTS)
    again = client.add_documents("people", DOCUMENTS)
    assert (again.unchanged, again.encoded, again.reused) == (6, 0, again.chunks)


def test_filters_keep_other_documents_out(client):
    client.add_documents("people", DOCUMENTS)
    answer = client.query(QUESTION, collection="people", top_k=20, filters={"group": 0})
    assert {chunk.document_id for chunk in answer.chunks} == {"people/0", "people/2", "people/4"}


def test_own_documents_need_no_collection(client, engine):
    first = client.query(QUESTION, documents=DOCUMENTS[:2])
    assert {chunk.kv for chunk in first.chunks} == {"computed"}
    assert all(chunk.why == "not stored yet" for chunk in first.chunks)
    wait_until(lambda: engine.health().encoding == 0)
    second = client.query(QUESTION, documents=DOCUMENTS[:2])
    assert {chunk.kv for chunk in second.chunks} == {"prefix"}
    behind = client.query(QUESTION, documents=DOCUMENTS[:2], system="Behind something else.")
    assert {chunk.kv for chunk in behind.chunks} <= {"ram", "ssd"}
    for answer in (first, second, behind):
        assert check_report(answer, answer.text) == []


def test_bad_input_is_answered_and_the_server_lives(client):
    with pytest.raises(NotFoundError, match="people"):
        client.query(QUESTION, collection="people")
    with pytest.raises(DocumentError, match="no text"):
        client.add_documents("people", [{"id": "e", "text": "  \n"}])
    with pytest.raises(PromptTooLongError, match="shorten"):
        client.query("why? " * 3000)
    with pytest.raises(InputError, match="question"):
        client.query("")
    mixed = client.add_documents("people", [DOCUMENTS[0], {"id": "empty", "text": ""}])
    assert (mixed.added, [one.document_id for one in mixed.rejected]) == (1, ["empty"])
    assert client.health().status == "ok"


def test_overlong_prompts_drop_the_lowest_ranks(client):
    long = [{"id": f"d{i}", "text": f"Fact {i} is this. " * 120} for i in range(6)]
    answer = client.query(QUESTION, documents=long)
    kinds = [chunk.kv for chunk in answer.chunks]
    assert "dropped" in kinds
    assert min(c.rank for c in answer.chunks if c.kv == "dropped") > max(c.rank for c in answer.sources)
    assert "dropped" in answer.warnings[0]


def test_hanging_up_stops_generation(client, engine):
    stream = client.stream("Tell me everything.", max_tokens=2000)
    next(event for event in stream if isinstance(event, TokenEvent))
    assert engine.health().running == 1
    stream.close()
    wait_until(lambda: engine.health().running == 0)


@pytest.mark.slow
def test_kill_during_ingest_loses_nothing(tiny_checkpoint, tmp_path):
    """SIGKILL in mid-ingest; afterwards the store is sound and the same ingest computes only what was missing."""
    lines = tmp_path / "passages.jsonl"
    text = "The {} stood by the river. " * 20
    lines.write_text("".join(f'{{"id": "p{i}", "text": "{text.format(*[i] * 20)}"}}\n' for i in range(400)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "RAGKV_MODEL": str(tiny_checkpoint),
        "RAGKV_DATA_DIR": str(tmp_path / "data"),
        "RAGKV_CHUNK_TOKENS": "32",
        "RAGKV_PORT": str(port),
    }
    serve = [sys.executable, "-c", "from ragkv.cli import main; main()", "serve"]
    server = subprocess.Popen(serve, env=environment)
    with Client(f"http://127.0.0.1:{port}", timeout=60) as client:
        wait_until(lambda: _up(port))
        threading.Thread(target=_swallow, args=(client, lines), daemon=True).start()
        wait_until(lambda: len(list((tmp_path / "data").rglob("*.kv"))) > 100)
        server.send_signal(signal.SIGKILL)
        server.wait()
    survivors = len(list((tmp_path / "data").rglob("*.kv")))
    server = subprocess.Popen(serve, env=environment)
    try:
        wait_until(lambda: _up(port))
        with Client(f"http://127.0.0.1:{port}", timeout=60) as client:
            report = client.upload("p", lines)
            assert report.reused >= survivors - 2  # writes that were under way may be lost, none that was done
            assert report.encoded + report.reused == report.chunks
            answer = client.query("What stood by the river?", collection="p")
            assert {chunk.kv for chunk in answer.chunks} <= {"ram", "ssd"}
    finally:
        server.terminate()
        assert server.wait(20) == 0


def _up(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _swallow(client, lines):
    try:
        client.upload("p", lines)
    except Exception:
        return
