"""What the server needs of an engine. ``ragkv.engine.Engine`` fulfils it; the server never imports torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Literal, Protocol

from ragkv.config import Settings
from ragkv.retrievers import Document
from ragkv.types import (
    CollectionInfo,
    DocumentInfo,
    DocumentOut,
    Event,
    Health,
    IngestReport,
    Request,
    StoreCheck,
    StoreInfo,
)

EncodeMode = Literal["eager", "lazy"]


class EngineAPI(Protocol):
    """An engine as the server sees it.

    Plain methods block and are thread-safe; the server calls them from worker threads. ``astream`` runs on the
    event loop and never blocks it: ``sources``, ``token`` …, ``done``. Cancelling the task that iterates it, or
    closing the iterator, stops the generation. It raises what is wrong with a request (unknown collection, full
    queue, …) before its first event. ``tenant`` is one of the settings', or "".
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

    def astream(self, request: Request, *, tenant: str = "") -> AsyncIterator[Event]: ...
    def cancel(self, request_id: str, *, tenant: str = "") -> None:
        """Raises NotFoundError when it is not this tenant's, or over; its stream ends with ``cancelled``."""

    def reprioritize(self, request_id: str, priority: int, *, tenant: str = "") -> None:
        """Lower is sooner. Raises NotFoundError when it is not this tenant's, or over."""

    def health(self) -> Health: ...
    def metrics(self) -> dict[str, float]: ...
    def tenant_service(self) -> dict[str, float]:
        """Computed tokens served to each tenant, priced as the scheduler does."""
        ...

    def cache_stats(self) -> StoreInfo: ...
    def cache_check(self, *, fix: bool = False) -> StoreCheck: ...
    def cache_clear(self) -> int: ...
