"""The command line: JSON for programs, one line for mistakes."""

from __future__ import annotations

import json
import re
import sys

import pytest

from ragkv import cli
from ragkv.cli.options import read_filters
from ragkv.store import ChunkStore
from ragkv.types import DocumentInfo
from ragkv.writer import Encoding
from tests.engine_kit import DOCUMENTS
from tests.fake_engine import FakeEngine
from tests.pool_kit import SHAPE


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for document in DOCUMENTS[:2]:
        (folder / f"{document.id}.txt").write_text(document.text)
    return folder


@pytest.fixture
def ragkv(monkeypatch, capsys, tiny_checkpoint, tmp_path):
    """Runs the command line in this process; gives exit status, stdout and stderr."""
    monkeypatch.setenv("RAGKV_MODEL", str(tiny_checkpoint))
    monkeypatch.setenv("RAGKV_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGKV_DTYPE", "float32")
    monkeypatch.setenv("RAGKV_DEVICE", "cpu")
    monkeypatch.setenv("RAGKV_MAX_TOKENS", "4")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, lines: list[str] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ragkv", *arguments])
        if lines is not None:
            waiting = iter(lines)
            monkeypatch.setattr("builtins.input", lambda prompt="": next_line(waiting))
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        else:
            status = 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


def next_line(waiting) -> str:
    for line in waiting:
        return line
    raise EOFError


def test_ingest_then_query_in_json(ragkv, folder):
    status, out, _ = ragkv("ingest", str(folder), "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["added"], report["rejected"]) == (2, [])
    assert report["encoded"] == report["chunks"] > 0
    assert report["estimate"]["new_kv_bytes"] == report["kv_bytes_written"]
    status, out, _ = ragkv("query", "Where is Ada?", "--json", "--method", "none", "--top-k", "3")
    answer = json.loads(out)
    assert status == 0
    assert (answer["method"], len(answer["chunks"])) == ("none", 3)
    assert {chunk["document_id"] for chunk in answer["chunks"]} <= {"ada.txt", "bela.txt"}
    status, out, _ = ragkv("cache", "stats", "--json")
    assert json.loads(out)["entries"] == report["encoded"]
    status, out, _ = ragkv("cache", "check", "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)
    status, out, _ = ragkv("cache", "clear", "--yes", "--json")
    assert json.loads(out) == {"removed": report["encoded"]}


def test_ingest_and_query_for_people(ragkv, folder):
    (folder / "empty.md").write_text(" ")
    status, out, err = ragkv("ingest", str(folder))
    assert status == 0
    assert "2 documents added" in out
    assert "rejected" in out
    assert "their KV takes" in err
    status, out, _ = ragkv("query", "Where is Ada?")
    assert status == 0
    for shown in ("ada.txt#", "first token after", "retrieve", "KV from"):
        assert shown in out


@pytest.mark.parametrize("given", [["a", "b"], ["a/notes.txt", "b/notes.txt"], ["lines.jsonl"]])
def test_of_documents_with_one_id_none_vanishes_in_silence(ragkv, tmp_path, given):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(f"Notes of {name}.")
    (tmp_path / "lines.jsonl").write_text('{"id": "notes.txt", "text": "one"}\n{"id": "notes.txt", "text": "two"}\n')
    status, out, _ = ragkv("ingest", *(str(tmp_path / path) for path in given), "--json")
    report = json.loads(out)
    assert (status, report["added"]) == (0, 1)
    [rejected] = report["rejected"]
    assert rejected["document_id"] == "notes.txt"
    assert "'notes.txt' comes twice" in rejected["message"]


@pytest.mark.parametrize("command", ["query", "chat"])
def test_what_a_question_computed_is_stored_before_the_command_ends(ragkv, folder, command):
    assert "0 computed" in ragkv("ingest", str(folder), "--lazy")[1]
    asked = ("query", "Where is Ada?") if command == "query" else ("chat", "-c", "default")
    status, _, err = ragkv(*asked, lines=["Where is Ada?"])
    assert (status, "storing chunk KV" in err) == (0, True)
    answer = json.loads(ragkv("query", "Where is Ada?", "--json")[1])
    assert {chunk["kv"] for chunk in answer["chunks"]} == {"ssd"}
    assert "storing chunk KV" not in ragkv("query", "Where is Ada?")[2]


def test_ctrl_c_gives_up_storing_and_nothing_else(ragkv, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    ragkv("ingest", str(folder), "--lazy", "--json")
    monkeypatch.setattr("ragkv.engine.Engine.drain", interrupted)
    status, out, _ = ragkv("query", "Where is Ada?", "--json")
    assert (status, bool(json.loads(out)["chunks"])) == (0, True)


def test_a_dry_run_only_says_what_it_would_take(ragkv, folder, tmp_path):
    status, out, _ = ragkv("ingest", str(folder), "--dry-run", "--json")
    assert (status, json.loads(out)["estimate"]["documents"]) == (0, 2)
    (folder / "empty.md").write_text(" ")
    status, out, err = ragkv("ingest", str(folder), "--dry-run")
    assert (status, "rejected: empty.md holds no text" in out, "their KV takes" in err) == (0, True, True)
    assert json.loads(ragkv("cache", "stats", "--json")[1])["entries"] == 0
    assert ragkv("query", "Where?")[0] == 1


def test_an_interrupted_ingest_says_what_is_stored_and_goes_on(ragkv, folder, monkeypatch):
    add = Encoding.add

    def add_one(encoding, group):
        add(encoding, group)
        encoding.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Encoding, "add", add_one)
        status, out, err = ragkv("ingest", str(folder))
    assert (status, out) == (130, "")
    stored, wanted = map(int, re.search(r"the KV of (\d+) of (\d+) chunks is stored", err).groups())
    assert 0 < stored < wanted
    assert json.loads(ragkv("cache", "stats", "--json")[1])["entries"] == stored
    report = json.loads(ragkv("ingest", str(folder), "--json")[1])
    assert (report["reused"], report["encoded"]) == (stored, wanted - stored)


def test_a_data_folder_that_cannot_be_written_points_to_its_option(ragkv, monkeypatch, tmp_path):
    ragkv("cache", "clear", "--yes")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    status, _, err = ragkv("cache", "clear", "--yes")
    assert status == 1
    assert f"{tmp_path / 'data' / 'store'} cannot be written" in err
    assert "--data-dir" in err
    assert "read_only=True" not in err


def test_chat_keeps_the_history_and_outlives_a_bad_question(ragkv):
    lines = ["Hello?", "  ", "why " * 3000, "And now?", "/exit", "never asked"]
    status, out, err = ragkv("chat", "--json", lines=lines)
    first, second = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert "prompt_too_long" in err
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    status, out, _ = ragkv("chat", lines=["Hello?"])
    assert (status, "first token after" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["query", "x", "--set", "bad"], "--set wants KEY=VALUE"),
        (["query", "x", "--set", "nonsense=1"], "unknown setting 'nonsense'"),
        (["query", "x", "--filter", "bad"], "--filter wants KEY=VALUE"),
        (["query", "x", "--set", "top_k=0"], "'top_k'"),
        (["query", "x", "--model", "./nowhere"], "not a model"),
        (["query", "x", "--device", "toaster"], "'device'"),
        (["query", "x", "--url", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (["cache", "stats", "--url", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (["ingest", "nowhere.txt"], "nowhere.txt"),
        (["ingest", "."], "no documents found"),
        (["serve", "--host", "256.1.1.1"], "256.1.1.1"),
    ],
)
def test_mistakes_are_one_line_and_status_1(ragkv, arguments, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    status, out, err = ragkv(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error (")
    assert err.count("\n") == 1
    assert said in err
    assert "Traceback" not in err
    status, out, _ = ragkv(*arguments, *([] if arguments[0] == "serve" else ["--json"]))
    assert status == 1
    if arguments[0] != "serve":
        assert said in json.loads(out)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["query", "x", "--method", "foo"], "method"),
        (["query", "x", "--ratio", "2"], "ratio"),
        (["query", "x", "--top-k", "0"], "top_k"),
        (["query", ""], "question"),
        (["query", "x", "-c", "bad name!"], "'bad name!'"),
        (["chat", "--method", "foo"], "method"),
        (["chat", "-c", "bad name!"], "'bad name!'"),
        (["ingest", "{folder}", "-c", "bad name!"], "'bad name!'"),
    ],
)
def test_bad_values_are_refused_before_the_model_is_loaded(ragkv, folder, monkeypatch, arguments, said):
    monkeypatch.setattr("ragkv.engine.Engine", lambda settings: pytest.fail("loaded"))
    status, out, _ = ragkv(*(argument.format(folder=folder) for argument in arguments), "--json")
    error = json.loads(out)["error"]
    assert (status, error["code"]) == (1, "input")
    assert said in error["message"]


def test_an_unknown_collection(ragkv):
    status, out, _ = ragkv("query", "x", "-c", "nowhere", "--json")
    assert (status, json.loads(out)["error"]["code"]) == (1, "not_found")


def test_collections_are_listed_looked_into_and_dropped_without_loading_the_model(ragkv, folder, monkeypatch):
    assert ragkv("collections", "list", "--json")[:2] == (0, "[]\n")
    assert "ragkv ingest makes one" in ragkv("collections", "list")[2]
    for name in ("one", "two"):
        ragkv("ingest", str(folder), "-c", name, "--lazy", "--json")
    monkeypatch.setattr("ragkv.engine.Engine", lambda settings: pytest.fail("loaded"))
    listed = json.loads(ragkv("collections", "list", "--json")[1])
    assert [(one["name"], one["documents"]) for one in listed] == [("one", 2), ("two", 2)]
    assert listed[0]["chunks"] > 0
    held = json.loads(ragkv("collections", "documents", "one", "--json")[1])
    assert [document["id"] for document in held] == ["ada.txt", "bela.txt"]
    assert json.loads(ragkv("collections", "documents", "one", "--offset", "1", "--json")[1]) == held[1:]
    assert json.loads(ragkv("collections", "documents", "one", "--limit", "1", "--json")[1]) == held[:1]
    assert "bela.txt" in ragkv("collections", "documents", "one")[1]
    assert ragkv("collections", "drop", "one", "--yes")[:2] == (0, "dropped one\n")
    assert [one["name"] for one in json.loads(ragkv("collections", "list", "--json")[1])] == ["two"]


@pytest.mark.parametrize(("name", "code"), [("nowhere", "not_found"), ("bad name!", "input"), ("..", "input")])
@pytest.mark.parametrize("command", [["documents"], ["drop", "--yes"]])
def test_a_collection_that_is_not_there(ragkv, command, name, code):
    status, out, _ = ragkv("collections", *command, name, "--json")
    assert (status, json.loads(out)["error"]["code"]) == (1, code)


def test_collections_of_a_running_server_are_asked_for_and_dropped_there(ragkv, monkeypatch):
    asked = []
    info = DocumentInfo(id="d", title=None, metadata={}, chunks=2, characters=30)
    monkeypatch.setattr("ragkv.client.Client.documents", lambda self, *given: asked.append(given) or [info])
    monkeypatch.setattr("ragkv.client.Client.drop_collection", lambda self, name: asked.append(name))
    server = ["--url", "http://127.0.0.1:1"]
    assert json.loads(ragkv("collections", "documents", "docs", *server, "--json")[1]) == [info.model_dump()]
    ragkv("collections", "drop", "docs", "--yes", *server)
    assert asked == [("docs", 0, 100), "docs"]


def test_dropping_asks_first(ragkv, folder, monkeypatch):
    ragkv("ingest", str(folder), "-c", "docs", "--lazy", "--json")
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert ragkv("collections", "drop", "docs")[0] == 1
    assert len(json.loads(ragkv("collections", "list", "--json")[1])) == 1


def test_a_damaged_store_is_told_by_the_exit_status_and_repaired(ragkv, folder, tmp_path):
    ragkv("ingest", str(folder), "--json")
    entry = next(path for path in (tmp_path / "data" / "store").rglob("*") if path.stat().st_size > 40_000)
    data = bytearray(entry.read_bytes())
    data[5000] ^= 1
    entry.write_bytes(data)
    status, out, _ = ragkv("cache", "check", "--json")
    assert (status, json.loads(out)["corrupt_entries"]) == (1, 1)
    status, out, _ = ragkv("cache", "check", "--fix", "--json")
    assert (status, json.loads(out)["fixed"]) == (0, True)
    assert json.loads(ragkv("cache", "check", "--json")[1])["ok"]


def test_what_is_on_disk_is_told_here_and_the_rest_by_a_server(ragkv, monkeypatch):
    _, out, _ = ragkv("cache", "stats", "--json", "--set", "store_policy=lru")
    assert json.loads(out)["policy"] == "lru"
    assert "hits_ram" not in json.loads(out)
    monkeypatch.setattr("ragkv.client.Client.cache_stats", lambda self: FakeEngine().cache_stats())
    status, out, _ = ragkv("cache", "stats", "--url", "http://127.0.0.1:1")
    assert status == 0
    for shown in ("hits_remote", "ram_bytes", "entries_by_model: fake"):
        assert shown in out


def test_idle_conversations_are_counted_and_cleared(ragkv, tmp_path):
    stats = ("cache", "stats", "--json")
    assert json.loads(ragkv(*stats)[1])["session_bytes"] == 0
    folder = tmp_path / "data" / "sessions"
    assert not folder.exists(), "looking makes nothing"
    slabs = [bytes(SHAPE.geometry.slab_bytes(16))] * SHAPE.geometry.layers
    with ChunkStore(folder, capacity_bytes=2**24, ram_bytes=0) as sessions:
        sessions.put(bytes(32), SHAPE.geometry, slabs, tokens=16, model="m")
        assert json.loads(ragkv(*stats)[1])["session_bytes"] == sessions.stats().bytes > 0
    assert json.loads(ragkv("cache", "clear", "--yes", "--json", "--set", "session_bytes=0")[1]) == {"removed": 1}
    assert json.loads(ragkv(*stats)[1])["session_bytes"] == 0


def test_clearing_asks_first(ragkv, folder, monkeypatch):
    ragkv("ingest", str(folder), "--json")
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert ragkv("cache", "clear")[0] == 1
    assert json.loads(ragkv("cache", "stats", "--json")[1])["entries"] > 0


def test_filters_are_read_as_json_where_they_are():
    given = ["year=1999", "lang=en", "open=true", 'page={"$gt": 3}', "eq=a=b"]
    assert read_filters(given) == {"year": 1999, "lang": "en", "open": True, "page": {"$gt": 3}, "eq": "a=b"}
    assert read_filters(None) is None


def test_every_command_has_help(ragkv):
    status, out, _ = ragkv("--help")
    assert status == 0
    for command in ("demo", "ingest", "query", "chat", "serve", "eval", "cache"):
        assert command in out
    assert ragkv("cache", "--help")[0] == 0
    assert ragkv("query", "--help")[0] == 0


def test_the_version(ragkv):
    from ragkv import __version__

    assert ragkv("--version")[:2] == (0, __version__ + "\n")
