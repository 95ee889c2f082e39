"""Files to documents: plain text, Markdown, HTML and JSON lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv.errors import DocumentError, NotFoundError
from ragkv.retrievers.types import MAX_TITLE, Document

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

MAX_BYTES = 50_000_000
KNOWN_TYPES = (".txt", ".md", ".markdown", ".html", ".htm", ".jsonl")

_HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*)$", re.M)
_EXTRACT_FIRST = {".pdf", ".doc", ".docx", ".odt", ".ppt", ".pptx", ".epub", ".rtf"}
_INVISIBLE = frozenset(("script", "style", "noscript", "template", "title", "svg", "iframe", "object"))
_BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|h[1-6r]"
    "|header|li|main|nav|ol|p|pre|section|summary|table|tr|ul"
)
_CELLS = frozenset(("td", "th"))


def load_path(
    path: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    on_error: Callable[[DocumentError], None] | None = None,
) -> Iterator[Document]:
    """The documents of a file, or of all files below a folder in sorted order, but not of hidden ones.

    A document's id is its path relative to the folder (POSIX style), or the file's name. Lines of a
    ``.jsonl`` file name themselves. A file, or such a line, that cannot be used raises DocumentError; with
    ``on_error`` the error is handed there and loading goes on with the next. Raises NotFoundError where
    nothing is at ``path``.
    """
    root = Path(path)
    if not root.exists():
        raise NotFoundError(f"no file or folder at {root}; check the path", path=str(root))
    files = _files(root) if root.is_dir() else [root]
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        try:
            documents = load_bytes(name, _read(file, max_bytes), max_bytes=max_bytes, on_error=on_error)
        except DocumentError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield from documents


def load_bytes(
    name: str,
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    on_error: Callable[[DocumentError], None] | None = None,
) -> list[Document]:
    """The documents in an uploaded file; ``name`` becomes the id, its extension tells the type.

    Raises DocumentError for an unknown type, too many bytes, invalid UTF-8, no text, or a bad JSON line; with
    ``on_error`` errors of single lines are handed there and the other lines are kept.
    """
    suffix = _checked_suffix(name)
    if len(data) > max_bytes:
        raise _too_large(name, len(data), max_bytes)
    text = _decode(name, data)
    if suffix == ".jsonl":
        documents = list(_json_lines(name, text, on_error))
    elif suffix in (".html", ".htm"):
        documents = [_html(name, text)]
    elif suffix in (".md", ".markdown"):
        documents = [Document(name, text, _heading(text))]
    else:
        documents = [Document(name, text)]
    if not text.strip() or not all(document.text.strip() for document in documents):
        raise DocumentError(f"{name} holds no text; remove it or extract its text first", path=name)
    return documents


def _files(root: Path) -> list[Path]:
    def hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(root).parts)

    return sorted(file for file in root.rglob("*") if file.is_file() and not hidden(file))


def _read(file: Path, max_bytes: int) -> bytes:
    _checked_suffix(file.name, path=str(file))
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise _too_large(str(file), size, max_bytes)
        return file.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot read {file}: {error.strerror}", path=str(file)) from error


def _checked_suffix(name: str, path: str | None = None) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in KNOWN_TYPES:
        return suffix
    known = ", ".join(KNOWN_TYPES)
    hint = f"extract its text first and add that as one of {known}" if suffix in _EXTRACT_FIRST else f"use {known}"
    raise DocumentError(
        f"{path or name} is of an unknown type ({suffix or 'no extension'}); {hint}",
        path=path or name,
        type=suffix,
    )


def _too_large(name: str, size: int, limit: int) -> DocumentError:
    return DocumentError(
        f"{name} has {size:,} bytes, the limit is {limit:,}; split it or raise the limit",
        path=name,
        bytes=size,
        limit=limit,
    )


def _decode(name: str, data: bytes) -> str:
    """UTF-8 without byte order mark, with ``\\n`` line ends."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError(
            f"{name} is not valid UTF-8 at byte {error.start} (line {line}); save it as UTF-8",
            path=name,
            byte=error.start,
            line=line,
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(name: str, text: str, on_error: Callable[[DocumentError], None] | None) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                yield _json_document(name, number, line)
        except DocumentError as error:
            if on_error is None:
                raise
            on_error(error)


def _json_document(name: str, number: int, line: str) -> Document:
    def bad(what: str) -> DocumentError:
        return DocumentError(
            f'{name}, line {number}: {what}; a line must be {{"text": "...", "id"?, "title"?, "metadata"?}}',
            path=name,
            line=number,
        )

    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise bad(f"a JSON object is needed, not {type(entry).__name__}")
    if unknown := sorted(entry.keys() - {"id", "text", "title", "metadata"}):
        raise bad(f"unknown key {unknown[0]!r} (own facts belong into metadata)")
    body, title, metadata = entry.get("text"), entry.get("title"), entry.get("metadata")
    if not isinstance(body, str) or not body.strip():
        raise bad("text is missing or empty")
    if title is not None and not isinstance(title, str):
        raise bad("title must be a string")
    if metadata is not None and not isinstance(metadata, dict):
        raise bad("metadata must be an object")
    own_id = entry.get("id")
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int) or own_id == ""):
        raise bad("id must be a non-empty string or an integer")
    return Document(_content_id(entry) if own_id is None else str(own_id), body, title or None, metadata or {})


def _content_id(entry: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(entry, sort_keys=True).encode(), digest_size=12).hexdigest()


def _heading(text: str) -> str | None:
    """The first Markdown heading, without the closing number signs it may have."""
    match = _HEADING.search(text)
    if match is None:
        return None
    title = match[1].strip()
    front, _, back = title.rpartition(" ")
    return _usable(front.rstrip() if back and not back.strip("#") else title)


def _usable(title: str) -> str | None:
    return title if 0 < len(title) <= MAX_TITLE else None


def _html(name: str, text: str) -> Document:
    from bs4 import BeautifulSoup

    try:
        soup = BeautifulSoup(text, "html.parser")
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} cannot be parsed as HTML: {error}", path=name) from error
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    paragraphs = (" ".join(part.split()) for part in "".join(_visible(soup)).split("\0"))
    return Document(name, "\n\n".join(part for part in paragraphs if part), _usable(title))


def _visible(soup: BeautifulSoup) -> Iterator[str]:
    """The visible strings, with a NUL wherever a block begins or ends.

    One walk that leaves the tree as it is: editing it, as bs4's own tools would, is quadratic in the page.
    """
    from bs4.element import NavigableString, Tag

    places: dict[int, tuple[int, bool]] = {id(soup): (0, False)}  # tag: (innermost block around it, hidden)
    last = 0
    for element in soup.descendants:
        block, hidden = places[id(element.parent)]
        if isinstance(element, Tag):
            if _BLOCK.fullmatch(element.name):
                block = id(element)
                yield "\0"
            elif element.name in _CELLS:
                yield " "
            places[id(element)] = block, hidden or element.name in _INVISIBLE
        elif type(element) is NavigableString and not hidden:  # its subclasses are comments, scripts and the like
            if block != last:
                yield "\0"
            last = block
            yield element
