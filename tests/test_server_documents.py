"""Collections and documents: JSON, uploads, limits, rejects, odd ids."""

from __future__ import annotations

import asyncio
import threading
from urllib.parse import quote

import pytest

from ragkv.errors import DocumentError, StoreFullError
from ragkv.server import create_app, upload
from tests.fake_engine import FakeEngine, local

pytestmark = pytest.mark.anyio
DOCUMENTS = "/v1/collections/c/documents"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    return FakeEngine(max_document_bytes=1000)


async def add(engine, *documents, **fields):
    async with local(engine) as http:
        return await http.post(DOCUMENTS, json={"documents": list(documents), **fields})


async def send_files(engine, *files, **data):
    async with local(engine) as http:
        return await http.post(DOCUMENTS, files=[("files", file) for file in files], data=data)


async def test_json_documents_are_added_listed_read_and_deleted(engine):
    report = (await add(engine, {"id": "a", "text": "A", "metadata": {"n": 1}}, {"text": "B"})).json()
    assert (report["added"], report["rejected"]) == (2, [])
    async with local(engine) as http:
        page = (await http.get(DOCUMENTS, params={"limit": 1, "offset": 0})).json()
        assert [d["id"] for d in page["documents"]] == ["a"]
        assert (await http.get(f"{DOCUMENTS}/a")).json()["text"] == "A"
        assert (await http.get("/v1/collections")).json()["collections"][0]["documents"] == 2
        assert (await http.delete(f"{DOCUMENTS}/a")).status_code == 204
        assert (await http.get(f"{DOCUMENTS}/a")).status_code == 404
        assert (await http.delete("/v1/collections/c")).status_code == 204
        assert (await http.delete("/v1/collections/c")).status_code == 404


async def test_an_id_is_derived_from_the_content(engine):
    for _ in range(2):
        await add(engine, {"text": "same"})
    await add(engine, {"text": "same", "title": "other"})
    assert len(engine.store["c"]) == 2


@pytest.mark.parametrize("name", ["docs/deep/a.md", "a b.txt", "ü?#.txt", "../up.txt", "%2F.txt"])
async def test_ids_may_be_any_file_path(engine, name):
    assert (await add(engine, {"id": name, "text": "x"})).status_code == 200
    async with local(engine) as http:
        url = f"{DOCUMENTS}/{quote(name, safe='')}"
        assert (await http.get(url)).json()["id"] == name
        assert (await http.delete(url)).status_code == 204
    assert engine.store["c"] == {}


async def test_bad_documents_are_listed_and_good_ones_go_in(engine):
    bad = [{"id": "empty", "text": " \n"}, {"id": "big", "text": "é" * 501}, {"txt": "x"}, 5, {"id": "", "text": "x"}]
    response = await add(engine, *bad, {"id": "good", "text": "é" * 500}, encode="lazy")
    report = response.json()
    assert (response.status_code, report["added"]) == (200, 1)
    assert [(r["document_id"], r["error"]) for r in report["rejected"]] == [
        ("empty", "document"),
        ("big", "document"),
        ("documents[2]", "input"),
        ("documents[3]", "input"),
        ("documents[4]", "document"),
    ]
    assert list(engine.store["c"]) == ["good"]
    assert engine.encode == ["lazy"]


@pytest.mark.parametrize(
    ("documents", "status", "code"),
    [
        ([{"text": ""}], 422, "document"),
        ([{"text": "x" * 1001}], 413, "document"),
        ([{"text": ""}, {"text": "x" * 1001}], 422, "document"),
        ([{"txt": ""}], 422, "input"),
        ([], 422, "input"),
    ],
)
async def test_nothing_usable_is_an_error_and_makes_no_collection(engine, documents, status, code):
    response = await add(engine, *documents)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert engine.store == {}


@pytest.mark.parametrize("fields", [{"encode": "now"}, {"encoding": "lazy"}])
async def test_unknown_fields_and_modes_are_refused(engine, fields):
    assert (await add(engine, {"text": "x"}, **fields)).status_code == 422


async def test_errors_of_the_engine_pass_through(engine):
    engine.fail = StoreFullError("the disk is full; free some", path="p")
    response = await add(engine, {"text": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (507, "store_full")
    engine.fail = DocumentError("all rejected")
    assert (await add(engine, {"text": "x"})).status_code == 422


async def test_files_are_uploaded(engine):
    response = await send_files(
        engine,
        ("sub/a.txt", b"plain"),
        ("b.md", "# Über\ntext".encode()),
        ("c.html", b"<title>T</title><p>para</p>"),
        ("d.jsonl", b'{"id": "d1", "text": "one"}\n{"id": "d2", "text": "two"}\n'),
        encode="lazy",
    )
    assert response.status_code == 200
    assert response.json()["added"] == 5
    assert set(engine.store["c"]) == {"sub/a.txt", "b.md", "c.html", "d1", "d2"}
    assert engine.store["c"]["b.md"].title == "Über"
    assert engine.encode == ["lazy"]


async def test_bad_files_are_listed_and_good_ones_go_in(engine):
    response = await send_files(
        engine,
        ("big.txt", b"x" * 1001),
        ("bin.exe", b"MZ"),
        ("latin.txt", b"\xff\xfe\xfd"),
        ("empty.txt", b""),
        ("fits.txt", b"x" * 1000),
    )
    report = response.json()
    assert response.status_code == 200
    assert [r["document_id"] for r in report["rejected"]] == ["big.txt", "bin.exe", "latin.txt", "empty.txt"]
    assert list(engine.store["c"]) == ["fits.txt"]


async def test_bad_lines_are_listed_and_good_ones_go_in(engine):
    lines = b'{"id": "a", "text": "one"}\n{"id": "b"}\n{"id": "c", "text": "three"}\n['
    report = (await send_files(engine, ("d.jsonl", lines))).json()
    assert [r["document_id"] for r in report["rejected"]] == ["d.jsonl", "d.jsonl"]
    assert [f"d.jsonl, line {n}" in r["message"] for n, r in zip((2, 4), report["rejected"], strict=True)] == [True] * 2
    assert set(engine.store["c"]) == {"a", "c"}


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [("big.txt", b"x" * 1001, 413), ("latin.txt", b"\xff", 422), ("a.exe", b"x", 422), ("a.txt", b"", 422)],
)
async def test_one_bad_file_alone_is_its_own_error(engine, name, content, status):
    response = await send_files(engine, (name, content))
    assert (response.status_code, response.json()["error"]["code"]) == (status, "document")
    assert engine.store == {}


async def test_an_upload_is_cut_off_at_the_limit_and_leaves_nothing_behind(engine, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sent = 0

    async def endless():
        nonlocal sent
        yield b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        while sent < 10_000_000:
            sent += 1000
            yield b"x" * 1000
            on_disk = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
            assert on_disk <= 1000

    async with local(engine) as http:
        response = await http.post(
            DOCUMENTS, content=endless(), headers={"content-type": "multipart/form-data; boundary=B"}
        )
    assert response.status_code == 413
    assert sent <= 1000 * (upload.UPLOAD_FACTOR + 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", range(1, 40))
async def test_a_body_may_be_cut_anywhere(engine, cut):
    body = (
        b'--B\r\nContent-Disposition: form-data; name="encode"\r\n\r\neager\r\n'
        b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nline\r\n--not the end\r\n--B--\r\n"
    )

    async def pieces():
        for start in range(0, len(body), cut):
            yield body[start : start + cut]

    async with local(engine) as http:
        response = await http.post(
            DOCUMENTS, content=pieces(), headers={"content-type": "multipart/form-data; boundary=B"}
        )
    assert response.status_code == 200, response.text
    assert engine.store["c"]["a.txt"].text == "line\n--not the end"
    assert engine.encode == ["eager"]


_FILE = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx'


@pytest.mark.parametrize(
    ("content_type", "body", "says"),
    [
        ("multipart/form-data", b"x", "boundary"),
        ("multipart/form-data; boundary=B", b"no parts", "multipart"),
        ("multipart/form-data; boundary=B", _FILE, "ends before"),
        ("multipart/form-data; boundary=B", b"", "ends before"),
        ("multipart/form-data; boundary=B", b"--B--\r\n", "no document"),
        ("multipart/form-data; boundary=B", _FILE.replace(b"a.txt", b"") + b"\r\n--B--\r\n", "without a name"),
        ("multipart/form-data; boundary=B", _FILE.replace(b'"files"', b'"fils"') + b"\r\n--B--\r\n", "'fils'"),
        ("multipart/form-data; boundary=B", _FILE.replace(b"a.txt", b"\xff.txt") + b"\r\n--B--\r\n", "UTF-8"),
        (
            "multipart/form-data; boundary=B",
            b'--B\r\nContent-Disposition: form-data; name="encode"\r\n\r\nnow\r\n--B--\r\n',
            "'now'",
        ),
    ],
)
async def test_a_malformed_upload_says_what_is_wrong(engine, content_type, body, says):
    async with local(engine) as http:
        response = await http.post(DOCUMENTS, content=body, headers={"content-type": content_type})
    assert response.status_code == 422, response.text
    assert says in response.json()["error"]["message"]
    assert engine.store == {}


async def test_too_many_files_are_refused(engine, monkeypatch):
    monkeypatch.setattr(upload, "MAX_FILES", 2)
    response = await send_files(engine, *((f"{n}.txt", b"x") for n in range(3)))
    assert response.status_code == 422


@pytest.mark.parametrize("params", [{"offset": -1}, {"limit": 0}, {"limit": 1001}, {"offset": "x"}, {"limit": 10**30}])
async def test_bad_page_bounds_name_the_parameter(engine, params):
    async with local(engine) as http:
        response = await http.get(DOCUMENTS, params=params)
    error = response.json()["error"]
    assert (response.status_code, error["context"]["errors"][0]["field"]) == (422, next(iter(params)))


async def test_running_ingests_keep_nothing_else_waiting(engine):
    engine.hold = threading.Event()
    try:
        async with local(engine) as http, asyncio.timeout(5):
            body = {"documents": [{"text": "x"}]}
            ingests = [asyncio.create_task(http.post(DOCUMENTS, json=body)) for _ in range(60)]
            while not engine.ingesting.is_set():
                await asyncio.sleep(0.01)
            assert (await http.post("/v1/query", json={"question": "x"})).status_code == 200
            assert (await http.get("/v1/collections")).status_code == 200
            assert (await http.get("/health")).status_code == 200
            engine.hold.set()
            assert {r.status_code for r in await asyncio.gather(*ingests)} == {200}
    finally:
        engine.hold.set()


async def test_hanging_up_in_mid_upload_ingests_nothing_and_is_no_failure_of_ours(engine, caplog):
    messages = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": _FILE, "more_body": True},
    ]
    sent = []

    async def receive():
        return messages.pop()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": DOCUMENTS,
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=B")],
    }
    await create_app(engine)(scope, receive, send)
    assert sent[0]["status"] == 499
    assert engine.store == {}
    assert caplog.records == []


async def test_numbers_json_cannot_say_do_not_break_an_answer(engine):
    await send_files(engine, ("a.jsonl", b'{"id": "a", "text": "x", "metadata": {"n": NaN}}'))
    async with local(engine) as http:
        response = await http.get(f"{DOCUMENTS}/a")
    assert response.status_code in (200, 404)
