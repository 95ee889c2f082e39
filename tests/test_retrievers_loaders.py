from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragkv.errors import DocumentError, NotFoundError
from ragkv.retrievers import load_bytes, load_path


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.txt", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert [document.id for document in load_path(tmp_path)] == ["a/c.txt", "a/z.md", "b.txt"]


def test_a_single_file_is_named_by_its_file_name(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfline\r\nnext\rlast")
    (document,) = load_path(tmp_path / "one.txt")
    assert (document.id, document.text, document.title) == ("one.txt", "line\nnext\nlast", None)


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n## The *title* ##\ntext", "The *title*"),
        ("# About C#\n", "About C#"),
        ("no heading, #hashtag", None),
        ("# " + "x" * 600, None),
    ],
)
def test_the_first_heading_is_the_title_of_markdown(text: str, title: str | None) -> None:
    (document,) = load_bytes("a.md", text.encode())
    assert (document.title, document.text) == (title, text)


def test_html_keeps_visible_text_in_paragraphs() -> None:
    page = """<html><head><title> My
      page </title><style>p {}</style></head><body><h1>Head</h1><p>One <b>bold</b> word.</p>
      <script>x()</script><!-- not this --><ul><li>first<li>second</ul>
      <table><tr><td>a</td><td>b</td></tr></table>tail</body></html>"""
    (document,) = load_bytes("page.HTML", page.encode())
    assert document.title == "My page"
    assert document.text == "Head\n\nOne bold word.\n\nfirst\n\nsecond\n\na b\n\ntail"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<head><title>T<body>never closed", ""),
        ("<head><meta><body>text<br>next", "text\n\nnext"),
        ("<p>in <i>line</i>d <p>outer <div>inner</div> rest", "in lined\n\nouter\n\ninner\n\nrest"),
        ("1 &lt; 2 &amp; caf&eacute;<template>no</template><noscript>no</noscript>", "1 < 2 & café"),
    ],
)
def test_untidy_html(page: str, text: str) -> None:
    if text:
        assert load_bytes("a.htm", page.encode())[0].text == text
    else:
        with pytest.raises(DocumentError, match="no text"):
            load_bytes("a.htm", page.encode())


def test_json_lines_hold_a_document_each() -> None:
    lines = [
        {"id": "x", "text": "one\u2028two", "title": "T", "metadata": {"year": 2020}},
        {"id": 7, "text": "numbered"},
        {"text": "no id"},
    ]
    data = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    first, second, third = load_bytes("many.jsonl", data)
    assert (first.id, first.text, first.title, first.metadata) == ("x", "one\u2028two", "T", {"year": 2020})
    assert second.id == "7"
    assert third.id == load_bytes("other.jsonl", b'{"text": "no id"}')[0].id
    assert third.id != load_bytes("other.jsonl", b'{"text": "no other id"}')[0].id


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "object is needed"),
        ('{"title": "t"}', "text is missing"),
        ('{"text": "  "}', "text is missing"),
        ('{"text": "t", "title": 3}', "title"),
        ('{"text": "t", "metadata": []}', "metadata"),
        ('{"text": "t", "id": ""}', "id must be"),
        ('{"text": "t", "id": true}', "id must be"),
        ('{"text": "t", "lang": "en"}', "unknown key 'lang'"),
    ],
)
def test_a_bad_json_line_is_named(line: str, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem) as caught:
        load_bytes("f.jsonl", f'{{"text": "fine"}}\n\n{line}'.encode())
    assert "f.jsonl, line 3" in caught.value.message
    assert caught.value.context["line"] == 3


def test_a_bad_json_line_keeps_no_other_out(tmp_path: Path) -> None:
    (tmp_path / "three.jsonl").write_text('{"text": "one"}\n{"title": "no text"}\n{"text": "three"}\n')
    (tmp_path / "bad.jsonl").write_text("{\n[1]\n")
    errors: list[DocumentError] = []
    documents = list(load_path(tmp_path, on_error=errors.append))
    assert [document.text for document in documents] == ["one", "three"]
    lines = [(error.context["path"], error.context["line"]) for error in errors]
    assert lines == [("bad.jsonl", 1), ("bad.jsonl", 2), ("three.jsonl", 2)]


def test_bytes_that_are_no_utf8_are_located() -> None:
    with pytest.raises(DocumentError, match=r"byte 6 \(line 2") as caught:
        load_bytes("latin.txt", b"first\n\xe9t\xe9")
    assert (caught.value.context["byte"], caught.value.context["line"]) == (6, 2)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("paper.pdf", b"%PDF", "extract its text first"),
        ("image.png", b"x", r"\.txt, \.md"),
        ("README", b"x", "no extension"),
        ("empty.txt", b" \n", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("blank.html", b"<p> <script>x</script>", "no text"),
        ("long.txt", b"x" * 101, "101 bytes, the limit is 100"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, data: bytes, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem) as caught:
        load_bytes(name, data, max_bytes=100)
    assert caught.value.context["path"] == name


def test_one_bad_file_does_not_stop_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.bin").write_bytes(b"\0")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text("x" * 200)
    (tmp_path / "e.txt").write_text("good too")
    errors: list[DocumentError] = []
    documents = list(load_path(tmp_path, max_bytes=100, on_error=errors.append))
    assert [document.id for document in documents] == ["a.txt", "e.txt"]
    assert len(errors) == 3
    with pytest.raises(DocumentError, match=r"b\.bin"):
        list(load_path(tmp_path))


def test_a_missing_path_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        list(load_path(tmp_path / "nowhere"))
