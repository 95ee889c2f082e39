"""Question files in the MuSiQue style: a JSON list of ``{"question", "answers", "ctxs": [{"title", "text"}]}``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ragkv.errors import InputError
from ragkv.retrievers import Document


@dataclass(frozen=True)
class AskedQuestion:
    """A question, its accepted answers, and the ids of the passages it was written over."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


@dataclass(frozen=True)
class QuestionFile:
    """Questions and the distinct passages behind them, in order of first appearance."""

    questions: tuple[AskedQuestion, ...]
    passages: tuple[Document, ...]


def read_questions(path: Path) -> QuestionFile:
    """Read ``path``.

    Raises:
        InputError: not readable, not JSON, or without the fields named above; says which entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read questions from {path}: {error}", path=str(path)) from error
    if not isinstance(entries, list):
        raise InputError(f"{path} holds no JSON list of questions", path=str(path))
    passages: dict[str, Document] = {}
    questions = []
    for number, entry in enumerate(entries):
        try:
            own = [_passage(context) for context in entry["ctxs"]]
            passages |= {document.id: document for document in own}
            ids = tuple(dict.fromkeys(document.id for document in own))
            questions.append(AskedQuestion(entry["question"], tuple(entry.get("answers", ())), ids))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: entry {number} lacks {error}", path=str(path), entry=number) from error
    return QuestionFile(tuple(questions), tuple(passages.values()))


def jsonl(documents: Sequence[Document]) -> Iterator[str]:
    """The documents as lines ``ragkv ingest`` reads."""
    for document in documents:
        yield json.dumps({"id": document.id, "title": document.title, "text": document.text}, ensure_ascii=False)


def _passage(context: dict[str, str]) -> Document:
    title, text = context["title"], context["text"]
    return Document("p" + blake3(f"{title}\0{text}".encode()).hexdigest(8), text, title)
