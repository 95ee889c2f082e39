"""Splitting a document into chunks of at most ``max_tokens`` tokens without losing a character.

The rule, in full:

1. The text is cut into blocks at blank lines and around Markdown headings, blocks into sentences (or list
   items and table rows). White space stays at the end of what it follows. A sentence that is over the budget
   is cut further: at line ends, then at spaces, then between characters.
2. Sentences are packed greedily. A chunk is closed when the next sentence does not fit, or **when the next
   sentence opens a block and the chunk is at least half full**. So chunks tend to begin where paragraphs
   begin, and an edit moves the borders only up to the next paragraph where both packings agree.
3. A heading is never the end of a chunk (unless the chunk holds nothing else): it moves on to what follows
   it.
4. Counts of joined text differ from the sum of counts, so every finished chunk is counted whole and shortened
   until it fits.

The work is linear in the text: each sentence is counted once, in batches, and each chunk about once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ragkv.errors import ConfigError
from ragkv.retrievers.types import Chunk, Document, chunk_id

_MIN_TOKENS = 16  # one code point can cost four byte tokens; below this a chunk may not hold even that
_COUNT_BATCH = 1024
_MAX_CHARS_PER_TOKEN = 8  # longer sentences are cut before counting, which keeps the halving below linear

_BLOCK = re.compile(r"(?P<heading>^\#{1,6}[ \t][^\n]*(?:\n|\Z)(?:[ \t]*\n)*) | \n(?:[ \t]*\n)+", re.M | re.X)
# The look-behinds keep a run of full stops from being scanned once per stop, and initials ("J. Doe") whole.
_SENTENCE = re.compile(
    r"""(?<![.!?…])(?<!\b[^\W\d_])[.!?…]+["'”’»)\]]*\s+   # . ! ? with closing quotes, then white space
      | [。！？]+[”’」』）]*\s*                             # full-width stops need no space
      | \n(?=[ \t]*(?:[-*+•|]|\d{1,3}[.)])[ \t])          # the next line is a list item or a table row
    """,
    re.X,
)


@dataclass(frozen=True, slots=True)
class _Unit:
    text: str
    tokens: int
    opens_block: bool
    heading: bool


class Splitter:
    """Cuts documents into chunks by a token budget; see the module's docstring for the rule.

    ``count_tokens`` counts the tokens of one text alone, without special tokens, as the model's tokenizer
    sees it; ``count_batch`` does so for many texts at once (optional, faster). ``tokenizer`` names the
    tokenizer: it is part of ``name``, and collections re-split a document that is added again under another
    name. Raises ConfigError for ``max_tokens`` under 16.
    """

    def __init__(
        self,
        count_tokens: Callable[[str], int],
        max_tokens: int = 128,
        *,
        count_batch: Callable[[Sequence[str]], Sequence[int]] | None = None,
        tokenizer: str = "",
    ) -> None:
        if max_tokens < _MIN_TOKENS:
            raise ConfigError(
                f"max_tokens = {max_tokens} is too small for a chunk; use at least {_MIN_TOKENS}",
                setting="max_tokens",
                value=max_tokens,
            )
        self.max_tokens = max_tokens
        self.name = f"sentences-1/{max_tokens}/{tokenizer}"
        self._count = count_tokens
        self._count_batch = count_batch or (lambda texts: [count_tokens(text) for text in texts])

    def split_document(self, document: Document) -> list[Chunk]:
        """The chunks of ``document.full_text``, in order."""
        return [
            Chunk(chunk_id(document.id, i), document.id, i, text, document.metadata, document.title)
            for i, text in enumerate(self.split(document.full_text))
        ]

    def split(self, text: str) -> list[str]:
        """Chunk texts, each of at most ``max_tokens`` tokens; joined they are ``text``."""
        units = list(self._units(text))
        chunks = []
        start = 0
        while start < len(units):
            end = self._fit(units, start)
            chunks.append(_join(units, start, end))
            start = end
        return chunks

    def _fit(self, units: Sequence[_Unit], start: int) -> int:
        """The end of the chunk that begins at unit ``start``."""
        end = self._fill(units, start)
        while True:
            if end < len(units):
                end = _before_headings(units, start, end)
            if end - start == 1 or self._count(_join(units, start, end)) <= self.max_tokens:
                return end
            end -= 1

    def _fill(self, units: Sequence[_Unit], start: int) -> int:
        total = units[start].tokens
        for i in range(start + 1, len(units)):
            unit = units[i]
            if total + unit.tokens > self.max_tokens:
                return i
            if unit.opens_block and total * 2 >= self.max_tokens and not units[i - 1].heading:
                return i
            total += unit.tokens
        return len(units)

    def _units(self, text: str) -> Iterator[_Unit]:
        batch: list[tuple[str, bool, bool]] = []
        for sentence in self._sentences(text):
            batch.append(sentence)
            if len(batch) == _COUNT_BATCH:
                yield from self._counted(batch)
                batch = []
        yield from self._counted(batch)

    def _sentences(self, text: str) -> Iterator[tuple[str, bool, bool]]:
        """Sentences as (text, opens a block, is a heading), none longer than could fit a chunk."""
        limit = self.max_tokens * _MAX_CHARS_PER_TOKEN
        for block, heading in _blocks(text):
            opens = True
            for sentence in _cut(block, (m.end() for m in _SENTENCE.finditer(block))):
                for piece in _pieces(sentence, limit):
                    yield piece, opens, heading
                    opens = False

    def _counted(self, batch: Sequence[tuple[str, bool, bool]]) -> Iterator[_Unit]:
        counts = self._count_batch([text for text, _, _ in batch]) if batch else []
        for (text, opens, heading), tokens in zip(batch, counts, strict=True):
            if tokens <= self.max_tokens or len(text) == 1:
                yield _Unit(text, tokens, opens, heading)
                continue
            middle = _soft_cut(text, 0, len(text) * 3 // 4, len(text) // 4)
            yield from self._counted([(text[:middle], opens, heading), (text[middle:], False, heading)])


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs and headings as (text, is a heading)."""
    start = 0
    for match in _BLOCK.finditer(text):
        if match["heading"] is None:
            yield text[start : match.end()], False
        else:
            if match.start() > start:
                yield text[start : match.start()], False
            yield match[0], True
        start = match.end()
    if start < len(text):
        yield text[start:], False


def _cut(text: str, ends: Iterator[int]) -> Iterator[str]:
    for start, end in pairwise(sorted({0, *ends, len(text)})):
        yield text[start:end]


def _pieces(text: str, limit: int) -> Iterator[str]:
    """``text`` in pieces of at most ``limit`` characters."""
    start = 0
    while len(text) - start > limit:
        end = _soft_cut(text, start, start + limit, start + limit // 2)
        yield text[start:end]
        start = end
    yield text[start:]


def _soft_cut(text: str, start: int, high: int, low: int) -> int:
    """Where to cut in (low, high]: behind the last line end, else the last white space, else at ``high``."""
    low = max(low, start)
    newline = text.rfind("\n", low, high)
    if newline >= 0:
        return newline + 1
    for i in range(high - 1, low - 1, -1):
        if text[i].isspace():
            return i + 1
    return max(high, start + 1)


def _before_headings(units: Sequence[_Unit], start: int, end: int) -> int:
    """``end`` moved before the headings the chunk ends with, unless it holds only headings."""
    last = end
    while last > start and units[last - 1].heading:
        last -= 1
    return last if last > start else end


def _join(units: Sequence[_Unit], start: int, end: int) -> str:
    return "".join(unit.text for unit in units[start:end])
