"""The nouns of retrieval: documents, their chunks, and hits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_TITLE = 500  # characters; the title stands in front of every chunk in the indexes

Metadata = Mapping[str, Any]
"""JSON-able facts about a document. Shared by all its chunks; treat it as read-only."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name. ``id`` is the caller's; adding the same id again replaces the document."""

    id: str
    text: str
    title: str | None = None
    metadata: Metadata = field(default_factory=dict)

    @property
    def full_text(self) -> str:
        """The text that is split, indexed and encoded: the title stands in front unless it already does.

        This is the only place that joins the two. The first chunk's KV thereby knows the title, and later
        chunks see it through their document context.
        """
        if not self.title or self.text.lstrip("# \t\n").startswith(self.title):
            return self.text
        return f"{self.title}\n{self.text}"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one document. The texts of a document's chunks, in order, join to its ``full_text``."""

    id: str
    document_id: str
    ordinal: int
    text: str
    metadata: Metadata = field(default_factory=dict)
    title: str | None = None

    @property
    def index_text(self) -> str:
        """What the indexes see: later chunks seldom name their subject, so the title leads them."""
        return f"{self.title}\n{self.text}" if self.title and self.ordinal else self.text


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved chunk.

    ``score`` is the ranking's own (BM25 score, cosine, or reciprocal-rank sum): comparable within one result
    only. ``rank`` counts from 1. ``ranks`` holds the rank each underlying ranking gave, e.g. ``{"bm25": 3,
    "dense": 1}``.
    """

    chunk: Chunk
    score: float
    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)


class Retriever(Protocol):
    """Text in, ranked chunks out.

    Implementations are thread-safe and deterministic: the same query on the same content gives the same hits,
    and equal scores are ordered by the documents' order of first arrival, then by chunk ordinal (in a fused
    ranking first by the better single rank). At most ``k`` hits come back, best first. ``filters`` (see
    ``ragkv.retrievers.filters``) act *before* ranking, so that ``k`` hits come whenever ``k`` permitted
    chunks have anything to do with the query.
    """

    def retrieve(self, query: str, k: int, *, filters: Mapping[str, Any] | None = None) -> list[Hit]: ...


def chunk_id(document_id: str, ordinal: int) -> str:
    return f"{document_id}#{ordinal}"
