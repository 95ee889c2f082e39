"""The SDK: a ragkv server's REST API as typed calls, sync (``Client``) and async (``AsyncClient``).

Both share everything but the I/O: ``ragkv.calls`` says what to send and how to read the answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from os import PathLike
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from ragkv import calls
from ragkv.calls import Call, Encode, EventReader
from ragkv.types import (
    Answer,
    CollectionInfo,
    DocumentInfo,
    DocumentLike,
    DocumentOut,
    Event,
    Health,
    IngestReport,
    QueryRequest,
    StoreCheck,
    StoreInfo,
)

DEFAULT_URL = "http://127.0.0.1:8377"
# Eager ingest answers when the last chunk is encoded, which takes minutes on a CPU.
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)

T = TypeVar("T")


class Client:
    """A ragkv server, called synchronously. Thread-safe; a context manager.

    Every call raises the class of ``ragkv.errors`` the server names (NotFoundError, QueueFullError, …),
    ServerError where there is no closer one or no server, and InputError for arguments that cannot be sent.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(transport=transport, **_options(base_url, api_key, timeout))

    def health(self) -> Health:
        """The server's state; one that failed is an answer, not an exception."""
        return self._send(calls.health())

    def collections(self) -> list[CollectionInfo]:
        return self._send(calls.collections())

    def drop_collection(self, name: str) -> None:
        return self._send(calls.drop_collection(name))

    def add_documents(
        self, collection: str, documents: Iterable[DocumentLike], encode: Encode | None = None
    ) -> IngestReport:
        """Add or replace documents in one request; a string is a document without id. Makes the collection at
        need.

        Bad documents are listed in ``rejected``; raises DocumentError where not one could be used.
        """
        return self._send(calls.add_documents(collection, documents, encode))

    def upload(self, collection: str, *paths: str | PathLike[str], encode: Encode | None = None) -> IngestReport:
        """Upload files and folders in one request. Documents are named by file, or path in the folder."""
        with calls.opened(paths) as files:
            return self._send(calls.upload(collection, files, encode))

    def documents(self, collection: str, offset: int = 0, limit: int = 100) -> list[DocumentInfo]:
        return self._send(calls.documents(collection, offset, limit))

    def document(self, collection: str, document_id: str) -> DocumentOut:
        return self._send(calls.document(collection, document_id))

    def delete_document(self, collection: str, document_id: str) -> None:
        return self._send(calls.delete_document(collection, document_id))

    def query(self, question: str | QueryRequest, **fields: Any) -> Answer:
        """The finished answer. ``fields`` are those of QueryRequest: ``collection="docs", top_k=5,
        session_id="visitor-17", …``. For OpenAI's chat route there is OpenAI's own client."""
        return self._send(calls.query(question, fields))

    def stream(self, question: str | QueryRequest, **fields: Any) -> Generator[Event, None, None]:
        """The answer's events as they come: sources, tokens, done. Closing the generator stops the model."""
        call = calls.stream(question, fields)
        return self._events(call)

    def cancel(self, request_id: str) -> None:
        """End a request, by the id in its stream's first event. Raises NotFoundError when it is over."""
        self._send(calls.cancel(request_id))

    def reprioritize(self, request_id: str, priority: int) -> None:
        """Lower is sooner. Raises NotFoundError when the request is over."""
        self._send(calls.reprioritize(request_id, priority))

    def cache_stats(self) -> StoreInfo:
        """Needs the server's api_key, like all ``cache_`` calls."""
        return self._send(calls.cache_stats())

    def cache_check(self, fix: bool = False) -> StoreCheck:
        return self._send(calls.cache_check(fix))

    def cache_clear(self) -> int:
        """Remove all stored KV, idle conversations' too; returns how many entries there were."""
        return self._send(calls.cache_clear())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        with calls.transport_errors(self._http.base_url, closed=self._http.is_closed):
            response = self._http.request(call.method, call.path, **call.arguments)
        return call.read(response)

    def _events(self, call: Call[None]) -> Generator[Event, None, None]:
        reader = EventReader()
        with (
            calls.transport_errors(self._http.base_url, closed=self._http.is_closed),
            self._http.stream(call.method, call.path, **call.arguments) as response,
        ):
            if not response.is_success:
                response.read()
            calls.check(response)
            for piece in response.iter_bytes():
                yield from reader.feed(piece)
        reader.finish()


class AsyncClient:
    """A ragkv server, called asynchronously: the methods of Client, awaited. An async context manager."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **_options(base_url, api_key, timeout))

    async def health(self) -> Health:
        return await self._send(calls.health())

    async def collections(self) -> list[CollectionInfo]:
        return await self._send(calls.collections())

    async def drop_collection(self, name: str) -> None:
        return await self._send(calls.drop_collection(name))

    async def add_documents(
        self, collection: str, documents: Iterable[DocumentLike], encode: Encode | None = None
    ) -> IngestReport:
        return await self._send(calls.add_documents(collection, documents, encode))

    async def upload(self, collection: str, *paths: str | PathLike[str], encode: Encode | None = None) -> IngestReport:
        with calls.opened(paths) as files:
            return await self._send(calls.upload(collection, files, encode))

    async def documents(self, collection: str, offset: int = 0, limit: int = 100) -> list[DocumentInfo]:
        return await self._send(calls.documents(collection, offset, limit))

    async def document(self, collection: str, document_id: str) -> DocumentOut:
        return await self._send(calls.document(collection, document_id))

    async def delete_document(self, collection: str, document_id: str) -> None:
        return await self._send(calls.delete_document(collection, document_id))

    async def query(self, question: str | QueryRequest, **fields: Any) -> Answer:
        return await self._send(calls.query(question, fields))

    def stream(self, question: str | QueryRequest, **fields: Any) -> AsyncGenerator[Event, None]:
        """Like Client.stream. Wrap it in ``contextlib.aclosing`` to leave the loop early."""
        call = calls.stream(question, fields)
        return self._events(call)

    async def cancel(self, request_id: str) -> None:
        await self._send(calls.cancel(request_id))

    async def reprioritize(self, request_id: str, priority: int) -> None:
        await self._send(calls.reprioritize(request_id, priority))

    async def cache_stats(self) -> StoreInfo:
        return await self._send(calls.cache_stats())

    async def cache_check(self, fix: bool = False) -> StoreCheck:
        return await self._send(calls.cache_check(fix))

    async def cache_clear(self) -> int:
        return await self._send(calls.cache_clear())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, call: Call[T]) -> T:
        with calls.transport_errors(self._http.base_url, closed=self._http.is_closed):
            response = await self._http.request(call.method, call.path, **call.arguments)
        return call.read(response)

    async def _events(self, call: Call[None]) -> AsyncGenerator[Event, None]:
        reader = EventReader()
        with calls.transport_errors(self._http.base_url, closed=self._http.is_closed):
            async with self._http.stream(call.method, call.path, **call.arguments) as response:
                if not response.is_success:
                    await response.aread()
                calls.check(response)
                async for piece in response.aiter_bytes():
                    for event in reader.feed(piece):
                        yield event
        reader.finish()


def _options(base_url: str, api_key: str | None, timeout: float | httpx.Timeout | None) -> dict[str, Any]:
    """What both of httpx's clients are made with. A server on this machine is never asked through a proxy."""
    with calls.transport_errors(httpx.URL()):
        url = httpx.URL(base_url)
    headers = {b"Authorization": b"Bearer " + api_key.encode()} if api_key is not None else {}
    local = url.host in ("127.0.0.1", "localhost", "::1")
    return {"base_url": url, "headers": headers, "timeout": timeout, "trust_env": not local}
