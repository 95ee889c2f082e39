"""Question files: a JSON list, or one JSON object a line, each a question with the contexts it is asked over.

The form is MuSiQue's as CacheBlend's code has it, ``{"question", "answers", "ctxs": [{"title", "text"}]}``; the names
and shapes that other data sets use for the same (``_QUESTION`` and its neighbours below) are understood, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from blake3 import blake3

from ragkv.errors import InputError
from ragkv.retrievers import Document

_QUESTION = ("question", "query", "input")
_CONTEXTS = ("ctxs", "contexts", "paragraphs", "passages", "documents", "context")
_ANSWERS = ("answers", "answer", "answer_aliases", "summary")
_TEXT = ("text", "paragraph_text", "contents", "content")
_KIND = ("kind", "type")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class AskedQuestion:
    """A question, its accepted answers, and the ids of the passages it was written over, in their order."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class QuestionFile:
    """Questions and the distinct passages behind them, in order of first appearance."""

    questions: tuple[AskedQuestion, ...]
    passages: tuple[Document, ...]


def read_questions(path: Path) -> QuestionFile:
    """Read ``path``.

    Raises:
        InputError: not readable, not JSON, without questions, or a field that is missing or of a wrong form; names
            line, entry and field.
    """
    passages: dict[str, Document] = {}
    questions = []
    for entry in _entries(path):
        own = [_passage(*context) for context in _contexts(entry)]
        passages |= {document.id: document for document in own}
        ids = tuple(dict.fromkeys(document.id for document in own))
        questions.append(AskedQuestion(_question(entry), _answers(entry), ids, _kind(entry)))
    if not questions:
        raise InputError(f"{path} holds no questions", path=str(path))
    return QuestionFile(tuple(questions), tuple(passages.values()))


def jsonl(documents: Sequence[Document]) -> Iterator[str]:
    """The documents as lines ``ragkv ingest`` reads."""
    for document in documents:
        yield json.dumps({"id": document.id, "title": document.title, "text": document.text}, ensure_ascii=False)


class _Entry(NamedTuple):
    path: Path
    number: int
    line: int
    fields: dict[str, Any]

    def pick(self, names: Sequence[str]) -> tuple[str | None, Any]:
        """The first of ``names`` that is there, and what it holds."""
        return next(((name, self.fields[name]) for name in names if self.fields.get(name) is not None), (None, None))

    def refuse(self, field: str, problem: str) -> NoReturn:
        raise InputError(
            f"{self.path}, line {self.line} (entry {self.number}): {field!r} {problem}",
            path=str(self.path),
            line=self.line,
            entry=self.number,
            field=field,
        )


def _entries(path: Path) -> Iterator[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        for number, (line, value) in enumerate(_listed(text) if text.lstrip()[:1] == "[" else _lines(text), 1):
            if not isinstance(value, dict):
                raise InputError(
                    f"{path}, line {line}: entry {number} is no JSON object of question, answers and ctxs",
                    path=str(path),
                    line=line,
                    entry=number,
                )
            yield _Entry(path, number, line, value)
    except OSError as error:
        raise InputError(f"cannot read questions from {path}: {error.strerror}", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read questions from {path}: {error}; it should be a JSON list, or one JSON object a line",
            path=str(path),
        ) from error


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _listed(text: str) -> Iterator[tuple[int, Any]]:
    """Elements of a JSON list, with the line each begins in, which ``json.loads`` does not tell."""
    decoder, at, line, counted = json.JSONDecoder(), _after_space(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = decoder.raw_decode(text, at)
        yield line, value
        at = _after_space(text, end)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _question(entry: _Entry) -> str:
    name, given = entry.pick(_QUESTION)
    field = name or _QUESTION[0]
    question = _text(entry, field, given)
    if not question.strip():
        entry.refuse(field, "is empty; every entry must ask something")
    return question


def _kind(entry: _Entry) -> str:
    _, kind = entry.pick(_KIND)
    return kind if isinstance(kind, str) else ""


def _contexts(entry: _Entry) -> list[tuple[str, str]]:
    """Titles and texts."""
    name, given = entry.pick(_CONTEXTS)
    contexts = [given] if isinstance(given, str) else given
    if name is None or not isinstance(contexts, list) or not contexts:
        entry.refuse(name or _CONTEXTS[0], "is missing or empty: it should be a list of contexts, each title and text")
    return [_context(entry, f"{name}[{i}]", context) for i, context in enumerate(contexts)]


def _context(entry: _Entry, field: str, context: Any) -> tuple[str, str]:
    """A text, an object of title and text, or HotpotQA's pair of a title and a text or its sentences."""
    title: Any = ""
    if isinstance(context, dict):
        name, text = _Entry(entry.path, entry.number, entry.line, context).pick(_TEXT)
        title, field = context.get("title") or "", f"{field}.{name or _TEXT[0]}"
    elif isinstance(context, list) and len(context) == 2:
        title, text = context
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = " ".join(part.strip() for part in text)
    else:
        text = context
    text = _text(entry, field, text)
    if not text.strip():
        entry.refuse(field, "is empty")
    return _text(entry, "title", title), text


def _answers(entry: _Entry) -> tuple[str, ...]:
    """All accepted answers, of whichever fields hold some; SQuAD's ``{"text": […]}`` too."""
    found: list[str] = []
    for name in _ANSWERS:
        given = entry.fields.get(name)
        given = given.get("text") if isinstance(given, dict) else given
        for answer in given if isinstance(given, list) else [] if given is None else [given]:
            number = isinstance(answer, int | float) and not isinstance(answer, bool)
            found.append(_text(entry, name, str(answer) if number else answer))
    return tuple(dict.fromkeys(answer for answer in found if answer.strip()))


def _text(entry: _Entry, field: str, value: Any) -> str:
    if not isinstance(value, str):
        entry.refuse(field, f"is no text but {type(value).__name__}" if value is not None else "is missing")
    try:
        value.encode()
    except UnicodeEncodeError:
        entry.refuse(field, "holds lone surrogates, which are not text; write valid UTF-8")
    return value


def _passage(title: str, text: str) -> Document:
    return Document("p" + blake3(f"{title}\0{text}".encode()).hexdigest(8), text, title)
