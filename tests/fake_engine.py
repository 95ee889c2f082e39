"""An engine without a model, for the server's and the SDK's tests, and ways to talk to an app over it."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
    Alternative,
    Answer,
    ChunkReport,
    CollectionInfo,
    DocumentInfo,
    DocumentOut,
    DoneEvent,
    Event,
    FinishReason,
    Health,
    IngestReport,
    QueryRequest,
    Request,
    Source,
    SourcesEvent,
    StoreCheck,
    StoreInfo,
    Timing,
    TokenEvent,
    TokenLogprob,
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
        self.requests: list[Request] = []
        self.tenants: list[str] = []
        self.finish_reason: FinishReason = "stop"
        self.priorities: dict[str, int] = {}
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

    async def astream(self, request: Request, *, tenant: str = "") -> AsyncIterator[Event]:
        self.requests.append(request)
        self.tenants.append(tenant)
        words = request.question if isinstance(request, QueryRequest) else request.messages[-1].content
        if self.fail is not None:
            raise self.fail
        if request.collection is not None:
            self._collection(request.collection)
        self.started.set()
        try:
            await asyncio.sleep(self.think)
            yield SourcesEvent(id="q-1", sources=[_SOURCE])
            for number, word in enumerate(self._words(words)):
                if self.fail_after is not None and number == self.fail_after[0]:
                    raise self.fail_after[1]
                yield TokenEvent(text=word, logprobs=_logprobs(word, request))
                await asyncio.sleep(self.pace)
            yield DoneEvent(answer=answer(words, self.finish_reason, request.logprobs))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    def cancel(self, request_id: str, *, tenant: str = "") -> None:
        """Knows the request q-1, which is the first one's tenant's."""
        if (request_id, tenant) != ("q-1", self.tenants[0]):
            raise NotFoundError(f"no request {request_id!r} of yours", request_id=request_id)
        self.endless = False
        self.finish_reason = "cancelled"

    def reprioritize(self, request_id: str, priority: int, *, tenant: str = "") -> None:
        if (request_id, tenant) != ("q-1", self.tenants[0]):
            raise NotFoundError(f"no request {request_id!r} of yours", request_id=request_id)
        self.priorities[request_id] = priority

    def tenant_service(self) -> dict[str, float]:
        return {tenant: 10.0 * self.tenants.count(tenant) for tenant in sorted(set(self.tenants))}

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


def answer(text: str, finish_reason: FinishReason = "stop", logprobs: int | None = None) -> Answer:
    chunk = {"tokens": 10, "why": None, "context_tokens": 0, "position": 5, "repaired_tokens": 1}
    return Answer(
        id="q-1",
        text=text,
        finish_reason=finish_reason,
        logprobs=None if logprobs is None else [_scored(word, logprobs) for word in _pieces(text)],
        preemptions=1,
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


def _logprobs(word: str, request: Request) -> list[TokenLogprob] | None:
    return None if request.logprobs is None else [_scored(word, request.logprobs)]


def _scored(word: str, alternatives: int) -> TokenLogprob:
    others = [Alternative(token_id=i, text=f"other{i}", logprob=-2.0 - i) for i in range(alternatives)]
    return TokenLogprob(token_id=7, text=word, logprob=-0.5, top=others)


def local(engine: FakeEngine, **fields: object) -> httpx.AsyncClient:
    """A client of the app in process, without sockets."""
    transport = httpx.ASGITransport(create_app(engine))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", **fields)  # type: ignore[arg-type]


class HangUp:
    """An ASGI client that disconnects once so many body pieces were sent to it."""

    def __init__(self, body, after):
        self._requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._after = after
        self._gone = asyncio.Event()
        self.messages = []
        self._check()

    async def receive(self):
        if self._requests:
            return self._requests.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.messages.append(message)
        self._check()

    def _check(self):
        if sum(m["type"] == "http.response.body" for m in self.messages) >= self._after:
            self._gone.set()

    def scope(self, path):
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}


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
