"""What a calibration asks: a user's questions, questions the model writes itself, or sentences to be continued."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ragkv.errors import InputError
from ragkv.retrievers import Chunk

WRITE = (
    "{text}\n\nWrite one short question that the text above answers. It must be clear to somebody who has not seen the "
    "text. Reply with the question only."
)
# A model that writes no question from most of the first texts is not asked for more.
TRIALS = 6
_WORDS = range(4, 41)
_LEAST_TOKENS = 10
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"\w{4,}")
_QUESTION_MARKS = ("?", "？", "؟")


@dataclass(frozen=True)
class Probe:
    """One thing to ask. ``answers`` are accepted ones, if any are known.

    ``ids`` and ``rest`` are those of a sentence to be continued: the prompt ends with ``ids``, and what the model
    expects is looked at before each token of ``rest``. ``source`` is the chunk it is from.
    """

    question: str
    answers: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()
    source: str | None = None


class Speaks(Protocol):
    """What is needed of a tokenizer."""

    def plain(self, text: str) -> tuple[int, ...]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def read_probes(path: Path) -> list[Probe]:
    """Questions of a text file, one a line, or of JSON lines: ``question``, and if known ``answers`` (a list, or one).

    Raises:
        InputError: it cannot be read, holds no questions, or a line is not of that form; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read questions from {path}: {error}", path=str(path)) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no questions; write one a line", path=str(path))
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        return [Probe(line) for _, line in numbered]
    return [_probe(path, number, line) for number, line in numbered]


def _probe(path: Path, number: int, line: str) -> Probe:
    def bad(what: str) -> InputError:
        form = '{"question": "…", "answers"?: ["…"]}'
        return InputError(f"{path}, line {number}: {what}; a line must be {form}", path=str(path), line=number)

    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise bad(f"a JSON object is needed, not {type(entry).__name__}")
    if "question" not in entry:
        raise bad('there is no "question"')
    question, answers = entry["question"], _listed(entry.get("answers", entry.get("answer")))
    if not (isinstance(question, str) and question.strip() and all(isinstance(answer, str) for answer in answers)):
        raise bad("question and answers must be text, the question not blank")
    return Probe(question.strip(), tuple(answers))


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def written(
    chunks: Iterable[Chunk], write: Callable[[str], str], limit: int, say: Callable[[int], None]
) -> list[Probe]:
    """Questions the model writes, one for a chunk; none where it cannot: what it writes must look like a question about
    the text, and be a new one, more often than not."""
    found: dict[str, Probe] = {}
    tried = 0
    for tried, chunk in enumerate(chunks, 1):
        if question := sensible(write(WRITE.format(text=chunk.text.strip())), chunk.text):
            found.setdefault(question, Probe(question, source=chunk.id))
        say(len(found))
        if len(found) == limit or (tried == TRIALS and 2 * len(found) <= tried):
            break
    return list(found.values()) if 2 * len(found) > tried else []


def sensible(reply: str, text: str) -> str | None:
    """The question that ``reply`` is, or None: one line of 4 to 40 words, ending in a question mark, that shares a word
    with the text."""
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    question = lines[0].strip('"“”') if len(lines) == 1 else ""
    asks = question.endswith(_QUESTION_MARKS) and len(question.split()) in _WORDS
    shared = {word.casefold() for word in _WORD.findall(question)} & {w.casefold() for w in _WORD.findall(text)}
    return question if asks and shared else None


def continuations(chunks: Sequence[Chunk], tokenizer: Speaks, room: int, seed: int = 0) -> Iterator[Probe]:
    """Sentences of ``chunks``, cut in the middle, with up to ``room`` tokens of the rest; one of each in turn."""
    draw = random.Random(seed)
    cut = [[p for s in _SENTENCE.split(chunk.text) if (p := _cut(chunk, s, tokenizer, room))] for chunk in chunks]
    for probes in cut:
        draw.shuffle(probes)
    for turn in range(max(map(len, cut), default=0)):
        yield from (probes[turn] for probes in cut if turn < len(probes))


def _cut(chunk: Chunk, sentence: str, tokenizer: Speaks, room: int) -> Probe | None:
    ids = tokenizer.plain(sentence.strip())
    if len(ids) < _LEAST_TOKENS:
        return None
    half = len(ids) // 2
    begin = tokenizer.decode(ids[:half]).strip()
    return Probe(begin, ids=ids[:half], rest=ids[half : half + room], source=chunk.id) if begin else None
