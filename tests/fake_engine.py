"""An engine without a model, for the server's and the SDK's tests, and ways to talk to an app over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator

import httpx

from ragkv.config import Settings
from ragkv.errors import NotFoundError
from ragkv.retrievers import Document
from ragkv.server import bind, create_app, url_of
from ragkv.server.run import server_for
from ragkv.types import (
    Answer,
    ChunkReport,
    CollectionInfo,
    DocumentInfo,
    DocumentOut,
    DoneEvent,
    Event,
    Health,
    IngestReport,
    QueryRequest,
    Source,
    SourcesEvent,
    StoreCheck,
    StoreInfo,
    Timing,
    TokenEvent,
    Usage,
)

KEY = "a-secret-key"


def settings(**fields: object) -> Settings:
    return Settings(**{"port": 0, **fields})  # type: ignore[arg-type]


class FakeEngine:
    """Answers every question with its own words, and remembers what was asked of it.

    Set ``fail`` to raise before the first event, ``fail_after`` to raise after so many tokens, ``think`` and
    ``pace`` to wait before the first event and between tokens, ``hold`` to let ingest wait for an event.
    """

    def __init__(self, **fields: object) -> None:
        self.settings = settings(**fields)
        self.store: dict[str, dict[str, Document]] = {}
        self.requests: list[QueryRequest] = []
        self.encode: list[str | None] = []
        self.fail: Exception | None = None
        self.fail_after: tuple[int, Exception] | None = None
        self.think = 0.0
        self.pace = 0.0
        self.endless = False
        self.hold: threading.Event | None = None
        self.ingesting = threading.Event()
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.status = "ok"
        self.hung = threading.Event()
        self.hung.set()
        self.fixed: list[bool] = []

    def ingest(self, collection: str, documents: Iterable[Document], *, encode: str | None = None) -> IngestReport:
        if self.fail is not None:
            raise self.fail
        self.ingesting.set()
        if self.hold is not None:
            self.hold.wait(10)
        self.encode.append(encode)
        kept = self.store.setdefault(collection, {})
        documents = list(documents)
        replaced = sum(d.id in kept for d in documents)
        kept.update((d.id, d) for d in documents)
        return IngestReport(
            collection=collection,
            added=len(documents) - replaced,
            replaced=replaced,
            unchanged=0,
            rejected=[],
            chunks=len(documents),
            encoded=len(documents),
            reused=0,
            deferred=0,
            kv_bytes_written=0,
            seconds=0.0,
            warnings=[],
        )

    def collections(self) -> list[CollectionInfo]:
        return [CollectionInfo(name=n, documents=len(d), chunks=len(d)) for n, d in self.store.items()]

    def drop_collection(self, name: str) -> None:
        self._collection(name)
        del self.store[name]

    def documents(self, collection: str, *, offset: int = 0, limit: int = 100) -> list[DocumentInfo]:
        page = list(self._collection(collection).values())[offset : offset + limit]
        return [DocumentInfo(**_info(d)) for d in page]

    def document(self, collection: str, document_id: str) -> DocumentOut:
        document = self._document(collection, document_id)
        return DocumentOut(**_info(document), text=document.text)

    def delete_document(self, collection: str, document_id: str) -> None:
        self._document(collection, document_id)
        del self.store[collection][document_id]

    async def aquery(self, request: QueryRequest) -> Answer:
        async for event in self.astream(request):
            if isinstance(event, DoneEvent):
                return event.answer
        raise AssertionError("no done event")

    async def astream(self, request: QueryRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        if self.fail is not None:
            raise self.fail
        if request.collection is not None:
            self._collection(request.collection)
        self.started.set()
        try:
            await asyncio.sleep(self.think)
            yield SourcesEvent(id="q-1", sources=[_SOURCE])
            for number, word in enumerate(self._words(request.question)):
                if self.fail_after is not None and number == self.fail_after[0]:
                    raise self.fail_after[1]
                yield TokenEvent(text=word)
                await asyncio.sleep(self.pace)
            yield DoneEvent(answer=answer(request.question))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    def health(self) -> Health:
        self.hung.wait(10)
        return Health(
            status=self.status,  # type: ignore[arg-type]
            version="0",
            model="fake",
            device="cpu",
            dtype="float32",
            blending="on",
            layer_loop="fused",
            running=1,
            queued=2,
            encoding=0,
        )

    def metrics(self) -> dict[str, float]:
        return {"running": 1, "queued": 2, "store_bytes": 4096}

    def cache_stats(self) -> StoreInfo:
        numbers = {n: 0 for n, f in StoreInfo.model_fields.items() if f.annotation is int}
        return StoreInfo(**numbers | {"entries": 3}, path="store", policy="cost", entries_by_model={"fake": 3})

    def cache_check(self, *, fix: bool = False) -> StoreCheck:
        self.fixed.append(fix)
        numbers = {n: 0 for n, f in StoreCheck.model_fields.items() if f.annotation is int}
        return StoreCheck(**numbers, tables_sound=True, fixed=fix, ok=True)

    def cache_clear(self) -> int:
        return 3

    def _words(self, question: str) -> Iterator[str]:
        yield from _pieces(question)
        while self.endless:
            yield "and so on "

    def _collection(self, name: str) -> dict[str, Document]:
        if name not in self.store:
            raise NotFoundError(f"no collection {name!r}; ingest documents first", collection=name)
        return self.store[name]

    def _document(self, collection: str, document_id: str) -> Document:
        kept = self._collection(collection)
        if document_id not in kept:
            raise NotFoundError(f"no document {document_id!r} in {collection!r}", document_id=document_id)
        return kept[document_id]


def answer(text: str) -> Answer:
    chunk = {"tokens": 10, "why": None, "context_tokens": 0, "position": 5, "repaired_tokens": 1}
    return Answer(
        id="q-1",
        text=text,
        finish_reason="stop",
        model="fake",
        method="default",
        ratio=0.15,
        context_policy="document",
        recomputed_share=0.1,
        chunks=[
            ChunkReport(**_SOURCE.model_dump(), **chunk, kv=kv, recomputed_token_layers=1)  # type: ignore[arg-type]
            for kv in ("ram", "ssd", "computed", "dropped")
        ],
        warnings=[],
        timing=Timing(**dict.fromkeys(Timing.model_fields, 250.0)),
        usage=Usage(prompt_tokens=20, context_tokens=10, cached_tokens=9, completion_tokens=2),
    )


def local(engine: FakeEngine, **fields: object) -> httpx.AsyncClient:
    """A client of the app in process, without sockets."""
    transport = httpx.ASGITransport(create_app(engine))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(engine: FakeEngine) -> Iterator[str]:
    """The URL of the app served over a real socket from a thread."""
    sock = bind(engine.settings)
    up = threading.Event()
    server = server_for(engine, announce=lambda _: up.set())
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        up.wait(10)
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join(15)
        sock.close()


def wait_for(condition: threading.Event, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition.is_set()


def _info(document: Document) -> dict[str, object]:
    return {
        "id": document.id,
        "title": document.title,
        "metadata": dict(document.metadata),
        "chunks": 1,
        "characters": len(document.text),
    }


def _pieces(text: str) -> Iterator[str]:
    for number, word in enumerate(text.split(" ")):
        yield f" {word}" if number else word


_SOURCE = Source(chunk_id="d#0", document_id="d", title="T", text="some text", rank=1, score=1.0)
