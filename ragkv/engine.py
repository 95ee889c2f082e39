"""The engine in one process: model, store, collections, and the doors the server, CLI and SDK share."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import torch

from ragkv.archive import Archive
from ragkv.calibrated import UNCALIBRATED
from ragkv.checkpoint import find_device, load_checkpoint
from ragkv.chunks import ChunkTokenizer
from ragkv.clock import Stopwatch
from ragkv.config import Settings, Tenant, load_settings
from ragkv.controller import Controller
from ragkv.delivery import Delivery, Emit, OutputThread
from ragkv.detokenize import Detokenizer
from ragkv.device_tier import DeviceTier, device_capacity
from ragkv.documents import collection_infos, document_infos
from ragkv.errors import CancelledError, ConfigError, InputError, NotFoundError
from ragkv.generation import Generation
from ragkv.ingest import Encode, Ingestor, Progress
from ragkv.loop import EngineLoop
from ragkv.machine import measure_machine
from ragkv.pinned import PageLocking
from ragkv.pipeline import Pipeline
from ragkv.pool import KvPool
from ragkv.pool_size import pool_sizes
from ragkv.retrievers import Catalog, Document, Splitter
from ragkv.sampling import SamplingParams
from ragkv.scheduling import Scheduler
from ragkv.selfcheck import find_fault
from ragkv.sessions import Sessions
from ragkv.store import ChunkStore
from ragkv.types import (
    Answer,
    CollectionInfo,
    ContextPolicy,
    DocumentInfo,
    DocumentLike,
    DocumentOut,
    DoneEvent,
    Event,
    Health,
    IngestEstimate,
    IngestReport,
    Request,
    StoreCheck,
    StoreInfo,
    make_request,
)
from ragkv.upkeep import store_check, store_info, store_metrics
from ragkv.version import __version__
from ragkv.writer import Writer

log = logging.getLogger("ragkv")


class Engine:
    """Ingest documents, ask questions. Thread-safe; close it, or use it as a context manager.

    Args:
        settings: from :func:`ragkv.config.load_settings`; None loads them.
        overrides: single settings, e.g. ``Engine(model="/models/llama", device="cpu")``.

    Raises:
        ConfigError, ModelError, StoreError: what it was told to use cannot be used.
    """

    def __init__(self, settings: Settings | None = None, **overrides: Any) -> None:
        self.settings = settings = _settings(settings, overrides)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._sessions: ChunkStore | None = None
        remote, device = settings.remote_url, find_device(settings.device)
        self._device_tier = DeviceTier(0, device)
        self._store = ChunkStore(
            settings.store_dir,
            capacity_bytes=settings.store_bytes,
            policy=settings.store_policy,
            ram_bytes=settings.ram_bytes,
            ram_allocate=PageLocking(device) if device.type == "cuda" else None,
            remote=remote.get_secret_value() if remote else None,
            remote_timeout_ms=settings.remote_timeout_ms,
            on_gone=lambda key: self._device_tier.drop(key),
        )
        try:
            self._start(settings)
        except BaseException:
            self._store.close()
            raise

    def _start(self, settings: Settings) -> None:
        self._checkpoint = checkpoint = load_checkpoint(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            cache_dir=settings.data_dir.expanduser(),
        )
        checkpoint.runner.check_layer = settings.check_layer
        tokenizer, dtype = checkpoint.tokenizer, str(checkpoint.runner.shape.dtype).removeprefix("torch.")
        self._dtype = dtype
        fault = find_fault(checkpoint.runner)
        if fault:
            log.warning("blending is off: %s", fault)
        self._uncalibrated = _calibration_doubt(settings, checkpoint.model_fingerprint)
        splitter = Splitter(
            tokenizer.count,
            settings.chunk_tokens,
            count_batch=tokenizer.count_many,
            tokenizer=tokenizer.fingerprint,
        )
        self._catalog = Catalog(settings.collections_dir, splitter, embedder=settings.embedder)
        chunk_tokenizer = ChunkTokenizer(
            tokenizer,
            model_fingerprint=checkpoint.model_fingerprint,
            dtype=dtype,
            context_tokens=context_room(settings, checkpoint.runner.max_positions),
            codec=settings.kv_codec,
            salt=settings.store_salt.get_secret_value().encode() if settings.store_salt else b"",
        )
        on = settings.controller == "on" and not fault
        self._controller = Controller(warms=settings.ram_bytes > 0) if on else None
        device = checkpoint.runner.device
        self._device_tier = DeviceTier(device_capacity(settings.device_bytes, device), device)
        runner = checkpoint.runner
        blocks, host_blocks = pool_sizes(settings, runner)
        self._loop = EngineLoop(
            runner,
            self._store,
            KvPool(runner.shape, runner.device, blocks, host_blocks, settings.preemption, self._archive(settings)),
            Scheduler(
                settings.scheduler,
                clock=time.monotonic,
                max_running=settings.max_running,
                max_queued=settings.max_queued,
                max_queued_tokens=settings.max_queued_tokens,
                max_preemptions=settings.max_preemptions,
                aging_s=settings.aging_s,
            ),
            max_running=settings.max_running,
            stall_s=settings.stall_ms / 1000,
            on_missing=lambda spans: self._ingestor.encode_later(spans),
            blending_off=fault,
            controller=self._controller,
            measuring=measure_machine(checkpoint.runner, settings.kv_codec) if self._controller else None,
            device_tier=self._device_tier,
        )
        self._output = OutputThread()
        # Retrieval and tokenising for asyncio callers; the loop's own few threads are left to whoever else needs them.
        self._callers = ThreadPoolExecutor(8, thread_name_prefix="ragkv-caller")
        self._writer = Writer(checkpoint, self._loop, self._store, settings.kv_codec)
        self._pipeline = Pipeline(checkpoint, self._catalog, splitter, chunk_tokenizer, settings, Sessions())
        self._ingestor = Ingestor(
            checkpoint, self._catalog, splitter, chunk_tokenizer, self._store, self._writer, settings
        )

    # Documents

    def estimate(self, documents: Iterable[Document | DocumentLike]) -> IngestEstimate:
        """What ingesting ``documents`` will take, without computing any KV."""
        return self._ingestor.estimate(documents)

    def ingest(
        self,
        collection: str,
        documents: Iterable[Document | DocumentLike],
        *,
        encode: Encode | None = None,
        context_policy: ContextPolicy | None = None,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Add documents (new, replaced or unchanged by id) and, unless lazy, compute the KV the store lacks.

        A document is a ``Document``, a mapping of its fields, or its text alone, which its content then names.
        ``progress(stage, done, total)`` is called from several threads, with the stages ``split`` (documents),
        ``index`` and ``encode`` (chunks).

        Raises:
            DocumentError: every document was rejected (single bad ones are listed in the report).
            InputError: ``documents`` is no list of them.
        """
        self._loop.refuse_when_closed()
        return self._ingestor.ingest(
            collection,
            documents,
            encode=encode or self.settings.encode,
            policy=context_policy or self.settings.context_policy,
            progress=progress,
        )

    def collections(self) -> list[CollectionInfo]:
        return collection_infos(self._catalog)

    def drop_collection(self, name: str) -> None:
        """Delete a collection. Its chunks' KV stays until evicted: other collections may share it."""
        self._catalog.drop(name)

    def documents(self, collection: str, *, offset: int = 0, limit: int = 100) -> list[DocumentInfo]:
        return document_infos(self._catalog.open(collection), offset, limit)

    def document(self, collection: str, document_id: str) -> DocumentOut:
        opened = self._catalog.open(collection)
        document = opened.get(document_id)
        return DocumentOut(
            id=document.id,
            title=document.title,
            metadata=dict(document.metadata),
            chunks=len(opened.chunks(document_id)),
            characters=len(document.text),
            text=document.text,
        )

    def delete_document(self, collection: str, document_id: str) -> None:
        """Remove a document and its chunks' KV.

        Raises:
            NotFoundError: no such collection or document.
        """
        opened = self._catalog.open(collection)
        self._ingestor.forget(opened, document_id)
        if not opened.delete(document_id):
            raise NotFoundError(f"no document {document_id!r} in {collection!r}", document_id=document_id)

    # Answers

    def query(self, request: Request | str, *, tenant: str = "", **fields: Any) -> Answer:
        """Answer a question, or the last message of a chat; ``fields`` are those of the request.

        ``tenant`` is one of the settings', or "": nobody's in particular.
        """
        for event in self.stream(request, tenant=tenant, **fields):
            if isinstance(event, DoneEvent):
                return event.answer
        raise CancelledError("the request ended without an answer")

    def stream(self, request: Request | str, *, tenant: str = "", **fields: Any) -> Iterator[Event]:
        """The answer as events: one ``sources``, then ``token`` …, then ``done``.

        Closing the iterator cancels the request.
        """
        events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        stop = threading.Event()
        self._submit(make_request(request, fields), tenant, events.put, stop)
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, DoneEvent):
                    return
        finally:
            stop.set()

    async def aquery(self, request: Request | str, *, tenant: str = "", **fields: Any) -> Answer:
        """:meth:`query` for asyncio; cancelling the task cancels the request."""
        async for event in self.astream(request, tenant=tenant, **fields):
            if isinstance(event, DoneEvent):
                return event.answer
        raise CancelledError("the request ended without an answer")

    async def astream(self, request: Request | str, *, tenant: str = "", **fields: Any) -> AsyncIterator[Event]:
        """:meth:`stream` for asyncio; closing the iterator or cancelling the task cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        stop = threading.Event()

        def emit(event: Event | Exception) -> None:
            with suppress(RuntimeError):  # the caller's event loop is gone, and so is the caller
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            wanted = make_request(request, fields)
            self._loop.refuse_when_closed()
            await loop.run_in_executor(self._callers, self._submit, wanted, tenant, emit, stop)
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, DoneEvent):
                    return
        finally:
            stop.set()

    def cancel(self, request_id: str, *, tenant: str = "") -> None:
        """End a request of ``tenant``; its stream ends with ``cancelled``.

        Raises:
            NotFoundError: there is no such request of this tenant's, or it is over.
        """
        self._loop.cancel(request_id, tenant)

    def reprioritize(self, request_id: str, priority: int, *, tenant: str = "") -> None:
        """Give a request of ``tenant`` another priority; lower is sooner.

        Raises:
            NotFoundError: there is no such request of this tenant's, or it is over.
        """
        self._loop.reprioritize(request_id, priority, tenant)

    # Upkeep

    def health(self) -> Health:
        loop = self._loop
        status: Literal["ok", "degraded", "failed"]
        status = "failed" if loop.failure else "degraded" if loop.blending_off else "ok"
        return Health(
            status=status,
            version=__version__,
            model=self._checkpoint.name,
            device=str(self._checkpoint.runner.device),
            dtype=self._dtype,
            blending=loop.failure or loop.blending_off or "on",
            layer_loop=self._checkpoint.runner.layer_loop,
            calibrated=self._uncalibrated is None,
            calibration=self._uncalibrated or str(self.settings.calibration),
            running=loop.running,
            queued=loop.queued,
            encoding=self._ingestor.pending,
        )

    def metrics(self) -> dict[str, float]:
        """Gauges by name, for a metrics page."""
        health = self.health()
        return {
            "running": health.running,
            "queued": health.queued,
            "encoding": health.encoding,
            **self._loop.stats(),
            **store_metrics(self._store.stats()),
            **self._device_tier.stats(),
            **(self._controller.stats() if self._controller else {}),
        }

    def tenant_service(self) -> dict[str, float]:
        """By tenant: prompt tokens computed for it, and twice its tokens of output."""
        return {tenant: float(service) for tenant, service in self._loop.service().items()}

    def cache_stats(self) -> StoreInfo:
        return store_info(self._store, self._sessions)

    def cache_check(self, *, fix: bool = False) -> StoreCheck:
        return store_check(self._store, fix=fix)

    def cache_clear(self) -> int:
        """Remove all KV on disk that is not being read; says how many entries. What idle conversations and the next
        questions miss is computed again."""
        return self._store.clear() + (self._sessions.clear() if self._sessions else 0)

    def drain(self, timeout: float | None = None, *, progress: Progress | None = None) -> bool:
        """Wait until the chunks that questions found missing are encoded and stored, so that the next ones load them.

        False if that takes longer than ``timeout`` seconds; ``progress("store", done, total)`` counts chunks. One that
        cannot be stored is told in the log and no longer waited for.
        """
        return self._ingestor.drain(timeout, progress)

    def close(self) -> None:
        """Stop serving. Requests in flight end with an EngineClosedError; what was stored stays.

        Chunks that still wait to be encoded are not stored: :meth:`drain` first if they must be.
        """
        self._loop.close()
        self._writer.close()
        self._callers.shutdown()
        self._output.close()
        self._catalog.close()
        self._store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, request: Request, tenant: str, emit: Emit, stop: threading.Event) -> None:
        """Prepare a request on the caller's thread and hand it to the engine's."""
        self._loop.refuse_when_closed()
        served = self._tenant(tenant)
        watch = Stopwatch()
        prepared = self._pipeline.prepare(request, watch, tenant)
        if stop.is_set():
            return
        checkpoint = self._checkpoint
        detokenizer = Detokenizer(checkpoint.tokenizer, request.stop)
        delivery = Delivery(prepared, detokenizer, checkpoint, self._output, emit, self._pipeline.remember)
        delivery.generation = Generation(
            id=f"q-{uuid.uuid4().hex[:16]}",
            plan=prepared.plan,
            strategy=prepared.strategy,
            ratio=prepared.ratio,
            as_asked=prepared.as_asked,
            remembered=request.session_id is not None,
            sampling=_sampling(request),
            max_tokens=prepared.max_tokens,
            stop_ids=checkpoint.tokenizer.eos_ids | checkpoint.runner.eos_ids,
            watch=watch,
            on_token=delivery.on_token,
            on_finish=delivery.on_finish,
            on_error=delivery.on_error,
            seed=request.seed or 0,
            lineage=prepared.lineage,
            tenant=tenant,
            weight=served.weight if served else 1.0,
            priority=request.priority if request.priority is not None else served.priority if served else 0,
            stop=stop,
        )
        # Announced before it is queued, so that no token can come first.
        self._loop.submit(delivery.generation, accepted=delivery.announce)

    def _archive(self, settings: Settings) -> Archive | None:
        """Where idle conversations' KV goes that RAM has no room for."""
        if not settings.session_bytes or settings.preemption != "reuse":
            return None
        self._sessions = ChunkStore(
            settings.sessions_dir,
            capacity_bytes=settings.session_bytes,
            policy="lru",
            ram_bytes=0,
        )
        return Archive(self._sessions, f"{self._checkpoint.model_fingerprint} {self._dtype}")

    def _tenant(self, name: str) -> Tenant | None:
        if name and name not in self.settings.tenants:
            raise InputError(f"there is no tenant {name!r}; known: {', '.join(self.settings.tenants) or 'none'}")
        return self.settings.tenants.get(name)


def _sampling(request: Request) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k_tokens,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=request.seed,
        logprobs=request.logprobs,
    )


def _calibration_doubt(settings: Settings, fingerprint: str) -> str | None:
    """Why the setting counts as not calibrated for this model, or None; the log tells, too."""
    record = settings.calibration
    doubt = record.doubt(fingerprint, settings) if record else UNCALIBRATED
    if doubt:
        log.log(logging.WARNING if record else logging.INFO, "method and ratio are not calibrated: %s", doubt)
    else:
        log.info("calibrated: %s", record)
    return doubt


def context_room(settings: Settings, positions: int) -> int:
    """Document context that leaves room for a chunk within the positions the model was trained for.

    Raises:
        ConfigError: a chunk alone does not fit them.
    """
    room = positions - settings.chunk_tokens - 16
    if room < 0:
        raise ConfigError(
            f"setting 'chunk_tokens': {settings.chunk_tokens} is too much for a model of {positions} positions",
            setting="chunk_tokens",
            value=settings.chunk_tokens,
        )
    if settings.context_tokens > room:
        log.warning("context_tokens is %d here: the model has %d positions", room, positions)
    return min(settings.context_tokens, room)


def _settings(settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    if settings is None:
        return load_settings(**overrides)
    if overrides:
        return load_settings(**{**settings.model_dump(), **overrides})
    return settings
