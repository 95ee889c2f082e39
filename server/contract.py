"""What the server needs of an engine. ``ragkv.engine.Engine`` fulfils it; the server never imports torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Literal, Protocol

from ragkv.config import Settings
from ragkv.retrievers import Document
from ragkv.types import (
    Answer,
    CollectionInfo,
    DocumentInfo,
    DocumentOut,
    Event,
    Health,
    IngestReport,
    QueryRequest,
    StoreCheck,
    StoreInfo,
)

EncodeMode = Literal["eager", "lazy"]


class EngineAPI(Protocol):
    """An engine as the server sees it.

    Plain methods block and are thread-safe; the server calls them from worker threads. ``aquery`` and
    ``astream`` run on the event loop and never block it. Cancelling the task that awaits them, or closing the
    iterator, stops the generation. ``astream`` raises what is wrong with a request (unknown collection, full
    queue, …) before its first event.
    """

    @property
    def settings(self) -> Settings: ...

    def ingest(
        self, collection: str, documents: Iterable[Document], *, encode: EncodeMode | None = None
    ) -> IngestReport: ...
    def collections(self) -> list[CollectionInfo]: ...
    def drop_collection(self, name: str) -> None: ...
    def documents(self, collection: str, *, offset: int = 0, limit: int = 100) -> list[DocumentInfo]: ...
    def document(self, collection: str, document_id: str) -> DocumentOut: ...
    def delete_document(self, collection: str, document_id: str) -> None: ...

    async def aquery(self, request: QueryRequest) -> Answer: ...
    def astream(self, request: QueryRequest) -> AsyncIterator[Event]: ...

    def health(self) -> Health: ...
    def metrics(self) -> dict[str, float]: ...
    def cache_stats(self) -> StoreInfo: ...
    def cache_check(self, *, fix: bool = False) -> StoreCheck: ...
    def cache_clear(self) -> int: ...
