"""Documents into a collection, their chunks' KV into the store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokenizer, ChunkTokens, EncodeGroup
from ragkv.config import Settings
from ragkv.documents import checked, distinct, name_of, to_document
from ragkv.errors import DocumentError, EngineClosedError, InputError, StoreFullError
from ragkv.plan import Span
from ragkv.retrievers import Catalog, Collection, Document, Splitter
from ragkv.store import ChunkStore
from ragkv.types import (
    ContextPolicy,
    DocumentLike,
    IngestEstimate,
    IngestReport,
    RejectedDocument,
    document_in,
    each_document,
)
from ragkv.writer import Encoding, Writer

log = logging.getLogger("ragkv")
Progress = Callable[[str, int, int], None]
Encode = Literal["eager", "lazy"]
_BATCH = 256


@dataclass
class _Tally:
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    chunks: int = 0
    reused: int = 0
    deferred: int = 0
    rejected: list[RejectedDocument] = field(default_factory=list)

    def reject(self, document_id: str, error: InputError) -> None:
        self.rejected.append(RejectedDocument(document_id=document_id, error=error.code, message=error.message))


class Ingestor:
    """Adds documents, encodes what the store lacks, eagerly or when a query first needs it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        catalog: Catalog,
        splitter: Splitter,
        chunk_tokenizer: ChunkTokenizer,
        store: ChunkStore,
        writer: Writer,
        settings: Settings,
    ) -> None:
        self._entry_bytes = partial(checkpoint.runner.shape.entry_bytes, codec=settings.kv_codec)
        self._catalog, self._splitter, self._chunk_tokenizer = catalog, splitter, chunk_tokenizer
        self._store, self._writer, self._settings = store, writer, settings
        self._pending: set[bytes] = set()
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """Chunks being encoded in the background."""
        return len(self._pending)

    def estimate(self, documents: Iterable[Document | DocumentLike]) -> IngestEstimate:
        """Bytes and work that ingesting ``documents`` will take, bad ones left out; computes no KV."""
        chunks = tokens = kv_bytes = new_kv_bytes = encode_tokens = 0
        planned: set[bytes] = set()
        good = self._accepted(documents, _Tally())
        for document in good:
            texts = self._splitter.split(document.full_text)
            parts = self._chunk_tokenizer.document(texts, self._settings.context_policy)
            groups = self._chunk_tokenizer.groups(parts, self._missing(parts) - planned)
            planned.update(key for group in groups for key in group.keys if key)
            chunks += len(parts)
            tokens += sum(len(part.ids) for part in parts)
            kv_bytes += sum(self._entry_bytes(len(part.ids)) for part in parts)
            new_kv_bytes += sum(self._entry_bytes(length) for group in groups for length in group.wanted_lengths)
            encode_tokens += sum(group.tokens for group in groups)
        return IngestEstimate(
            documents=len(good),
            chunks=chunks,
            tokens=tokens,
            kv_bytes=kv_bytes,
            new_kv_bytes=new_kv_bytes,
            encode_tokens=encode_tokens,
            capacity_bytes=self._settings.store_bytes,
        )

    def ingest(
        self,
        name: str,
        documents: Iterable[Document | DocumentLike],
        *,
        encode: Encode,
        policy: ContextPolicy,
        progress: Progress | None,
    ) -> IngestReport:
        """Add ``documents`` to collection ``name``. A bad document is rejected alone, the rest goes in; so is one with
        the id of an earlier one and other content.

        Raises:
            DocumentError: every single document was rejected.
            EngineClosedError: the engine was closed meanwhile; what was done stays.
        """
        say = progress or (lambda stage, done, total: None)
        started = time.perf_counter()
        tally = _Tally()
        good = self._accepted(documents, tally)
        if tally.rejected and not good:
            first = tally.rejected[0]
            raise DocumentError(first.message, document_id=first.document_id, rejected=len(tally.rejected))
        collection = self._catalog.get_or_create(name)
        for at in range(0, len(good), _BATCH):
            batch = good[at : at + _BATCH]
            self._add(collection, batch, tally)
            say("split", at + len(batch), len(good))
        say("index", 0, 1)
        collection.refresh()  # or the first query would wait for it
        say("index", 1, 1)
        encoding = self._encode(self._groups(collection, good, policy, tally), encode, tally, say)
        if isinstance(encoding.error, EngineClosedError):
            raise encoding.error
        return IngestReport(
            collection=name,
            added=tally.added,
            replaced=tally.replaced,
            unchanged=tally.unchanged,
            rejected=tally.rejected,
            chunks=tally.chunks,
            encoded=encoding.encoded,
            reused=tally.reused,
            deferred=tally.deferred + encoding.given_up,
            kv_bytes_written=encoding.bytes_written,
            seconds=time.perf_counter() - started,
            warnings=_warnings(encoding),
        )

    def encode_later(self, spans: Sequence[Span]) -> None:
        """Encode chunks a prefill had to compute, in the background; called on the engine thread."""
        for span in spans:
            tokens = span.chunk.tokens
            with self._changed:
                if tokens.key in self._pending:
                    continue
                self._pending.add(tokens.key)
            settled = partial(self._settled, tokens.key)
            try:
                self._writer.submit(self._chunk_tokenizer.single(tokens), settled)
            except EngineClosedError as error:
                settled(0, error)

    def drain(self, timeout: float | None, progress: Progress | None) -> bool:
        """Wait until nothing is being encoded in the background; False if that takes longer than ``timeout`` s."""
        say = progress or (lambda stage, done, total: None)
        end = None if timeout is None else time.monotonic() + timeout
        total = 0
        while left := self.pending:
            total = max(total, left)
            say("store", total - left, total)
            with self._changed:
                rest = None if end is None else end - time.monotonic()
                if self.pending == left and not self._changed.wait(rest):
                    return False
        say("store", total, total)
        return True

    def forget(self, collection: Collection, document_id: str) -> None:
        """Remove a document's chunks from the store. Other documents with the same chunks re-encode them."""
        texts = [chunk.text for chunk in collection.chunks(document_id)]
        self._store.delete(
            [t.key for policy in ("document", "alone") for t in self._chunk_tokenizer.document(texts, policy)]
        )

    def _settled(self, key: bytes, _written: int, error: Exception | None) -> None:
        with self._changed:
            self._pending.discard(key)
            self._changed.notify_all()
        if error and not isinstance(error, EngineClosedError):
            log.warning("a chunk could not be stored and will be computed again: %s", error)

    def _accepted(self, documents: Iterable[Document | DocumentLike], tally: _Tally) -> list[Document]:
        """Those that can be used; the others are rejected."""
        usable = self._usable(documents, tally)
        return list(distinct(usable, lambda error: tally.reject(str(error.context["document_id"]), error)))

    def _usable(self, documents: Iterable[Document | DocumentLike], tally: _Tally) -> Iterator[Document]:
        for place, given in each_document(documents):
            try:
                document = given if isinstance(given, Document) else to_document(document_in(given, place))
                yield checked(document, max_bytes=self._settings.max_document_bytes)
            except InputError as error:
                tally.reject(name_of(given, place), error)

    def _add(self, collection: Collection, batch: Sequence[Document], tally: _Tally) -> None:
        """Add a batch; where it holds a document the collection refuses, add its documents one by one."""
        try:
            report = collection.add(batch)
        except DocumentError as error:
            if len(batch) == 1:
                tally.reject(batch[0].id, error)
                return
            for document in batch:
                self._add(collection, [document], tally)
            return
        tally.added += len(report.added)
        tally.replaced += len(report.replaced)
        tally.unchanged += len(batch) - len(report.added) - len(report.replaced)  # those that come twice, too

    def _groups(
        self, collection: Collection, documents: Sequence[Document], policy: ContextPolicy, tally: _Tally
    ) -> list[EncodeGroup]:
        """What must be computed, with what is stored already counted."""
        todo: list[EncodeGroup] = []
        planned: set[bytes] = set()  # documents may share chunks
        for document_id in dict.fromkeys(document.id for document in documents):
            if document_id not in collection:
                continue
            texts = [chunk.text for chunk in collection.chunks(document_id)]
            parts = self._chunk_tokenizer.document(texts, policy)
            groups = self._chunk_tokenizer.groups(parts, self._missing(parts) - planned)
            planned.update(key for group in groups for key in group.keys if key)
            tally.chunks += len(parts)
            tally.reused += len(parts) - sum(group.wanted for group in groups)
            todo += groups
        return todo

    def _encode(self, todo: Sequence[EncodeGroup], encode: Encode, tally: _Tally, say: Progress) -> Encoding:
        total = sum(group.wanted for group in todo)
        encoding = Encoding(self._writer, lambda done: say("encode", done, total))
        if encode == "lazy":
            tally.deferred = total
            return encoding
        for group in todo:
            encoding.add(group)
        encoding.wait()
        return encoding

    def _missing(self, parts: Sequence[ChunkTokens]) -> set[bytes]:
        infos = self._store.lookup([part.key for part in parts])
        return {part.key for part, info in zip(parts, infos, strict=True) if info is None}


def _warnings(encoding: Encoding) -> list[str]:
    if encoding.error is None:
        return []
    hint = "; raise store_bytes or free disk space" if isinstance(encoding.error, StoreFullError) else ""
    return [
        f"{encoding.given_up} chunks were not stored and will be computed when a query needs them: "
        f"{encoding.error}{hint}"
    ]
