"""The prompt plan: which token stands where, and which spans are chunks.

    prefix (system, history) | chunk | chunk | … | question

The prefix and the question are always computed exactly; the chunks are what stored KV is for. The ids of the
plan are also what a full prefill means in every comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ragkv.chunks import ChunkTokens
from ragkv.errors import InputError, PromptTooLongError
from ragkv.retrievers import Chunk


@dataclass(frozen=True, eq=False)
class PlannedChunk:
    """A chunk to be placed in a prompt: who it is, how it was found, what its tokens are."""

    chunk: Chunk
    rank: int
    score: float
    tokens: ChunkTokens


@dataclass(frozen=True, eq=False)
class Span:
    """Where a chunk stands: positions ``start … end - 1``.

    ``context_present``: the chunks its KV was encoded behind stand before it in this prompt. When they do
    not, recomputing its tokens would forget what the context knew.
    """

    chunk: PlannedChunk
    start: int
    end: int
    context_present: bool

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PromptPlan:
    """``ids`` is the whole prompt; ``dropped`` are chunks that did not fit, lowest-ranked first to go; ``standing``
    those that an earlier turn put there."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    question_start: int
    dropped: tuple[PlannedChunk, ...]
    standing: tuple[PlannedChunk, ...] = ()

    @property
    def context_tokens(self) -> int:
        return sum(span.length for span in self.spans)

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """``ids``, to calculate with; not to be written."""
        pieces, done = [], 0
        for span in self.spans:
            pieces += [np.array(self.ids[done : span.start], np.int64), span.chunk.tokens.array]
            done = span.end
        return np.concatenate((*pieces, np.array(self.ids[done:], np.int64)))


def make_plan(
    prefix: Sequence[int],
    chunks: Sequence[PlannedChunk],
    question: Sequence[int],
    *,
    budget: int,
    standing: Collection[bytes] = (),
) -> PromptPlan:
    """Lay out a prompt of at most ``budget`` tokens. Chunks whose key is in ``standing`` are in ``prefix`` already.

    Documents stand in the order of their best-ranked chunk, chunks of one document together and in document
    order, so that a reference to the chunk before finds it before. The lowest-ranked chunks are dropped
    until the rest fits.

    Raises:
        InputError: ``question`` is empty.
        PromptTooLongError: prefix and question alone are over the budget.
    """
    if not question:
        raise InputError("the question has no tokens; the answer could not begin anywhere")
    room = budget - len(prefix) - len(question)
    if room < 0:
        raise PromptTooLongError(
            f"the question, system text and history take {len(prefix) + len(question)} tokens, the model has room "
            f"for {max(budget, 0)} beside max_tokens; shorten them or lower max_tokens",
            tokens=len(prefix) + len(question),
            limit=budget,
        )
    kept: list[PlannedChunk] = []
    dropped: list[PlannedChunk] = []
    for chunk in sorted((c for c in chunks if c.tokens.key not in standing), key=lambda c: c.rank):
        if not dropped and len(chunk.tokens.ids) <= room:
            kept.append(chunk)
            room -= len(chunk.tokens.ids)
        else:
            dropped.append(chunk)
    ids = list(prefix)
    spans: list[Span] = []
    for chunk in _prompt_order(kept):
        spans.append(Span(chunk, len(ids), len(ids) + len(chunk.tokens.ids), _context_present(chunk, spans)))
        ids += chunk.tokens.ids
    there = tuple(chunk for chunk in chunks if chunk.tokens.key in standing)
    return PromptPlan((*ids, *question), tuple(spans), len(ids), tuple(dropped), there)


def _prompt_order(chunks: list[PlannedChunk]) -> list[PlannedChunk]:
    first_rank: dict[str, int] = {}
    for chunk in chunks:
        first_rank.setdefault(chunk.chunk.document_id, chunk.rank)
    return sorted(chunks, key=lambda c: (first_rank[c.chunk.document_id], c.chunk.ordinal))


def _context_present(chunk: PlannedChunk, before: list[Span]) -> bool:
    present = {span.chunk.chunk.ordinal for span in before if span.chunk.chunk.document_id == chunk.chunk.document_id}
    first = chunk.chunk.ordinal - chunk.tokens.context_chunks
    return present.issuperset(range(first, chunk.chunk.ordinal))
