"""A collection: documents, their chunks and the indexes over them, in one folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ragkv.errors import CollectionError, ConfigError, DocumentError, InputError, NotFoundError
from ragkv.retrievers.database import Database, DocumentInfo, make_chunks
from ragkv.retrievers.embedders import Embedder, make_embedder
from ragkv.retrievers.filters import Filters, compile_filters
from ragkv.retrievers.snapshot import Snapshot, load_or_build
from ragkv.retrievers.splitter import Splitter
from ragkv.retrievers.types import MAX_TITLE, Chunk, Document, Hit

DATABASE = "collection.db"
_INDEX = "index.npz"
_BATCH = 256  # documents a transaction
_BATCH_CHARS = 4_000_000  # or this much text, whichever comes first
_MAX_ID = 1024

Mode = Literal["fused", "bm25", "dense"]


@dataclass(frozen=True, slots=True)
class AddReport:
    """What ``add`` did: document ids by outcome, and how many chunk texts came and went.

    A chunk whose text was already in the document's earlier version counts neither as added nor as removed.
    """

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unchanged: tuple[str, ...]
    chunks_added: int
    chunks_removed: int


@dataclass(frozen=True, slots=True)
class CollectionStats:
    documents: int
    chunks: int
    characters: int
    embedder: str
    bytes_on_disk: int


class Collection:
    """Documents and their chunks in a SQLite file, BM25 and dense indexes derived from them. A ``Retriever``.

    Thread-safe; other processes may have the same folder open. What ``add`` or ``delete`` committed, here or
    in another process, is seen by every ``retrieve`` that begins afterwards: the first such call rebuilds the
    indexes, or ``refresh`` does so ahead of time. A process killed at any moment leaves every document in its
    old or its new state.

    ``embedder`` ("svd", a folder or a hub id) is chosen when the folder is created and kept; None takes what
    is kept, or "svd". Raises CollectionError where the files cannot be used, ConfigError where another
    embedder is asked for.
    """

    def __init__(self, folder: str | Path, splitter: Splitter, *, embedder: str | None = None) -> None:
        self.folder = Path(folder)
        self.splitter = splitter
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CollectionError(
                f"cannot create {self.folder}: {error.strerror}; choose a writable folder",
                path=str(self.folder),
            ) from error
        self._database = Database(self.folder / DATABASE)
        self._build_lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._embedder: Embedder | None = None
        try:
            self.embedder = self._settle_embedder(embedder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def add(self, documents: Iterable[Document], progress: Callable[[int], None] | None = None) -> AddReport:
        """Add documents, replacing those whose id is already here; one with equal content is left alone.

        Content is text, title, metadata and the splitter's name. Documents are committed in batches of 256;
        ``progress`` is called with the number done so far after each. Raises DocumentError for a document
        without id or text, with metadata that is not JSON, or with the id of an earlier one of this call and
        other content; earlier batches then stay, the batch that holds it does not.
        """
        report, done = _Report(), 0
        for batch in _batches(documents):
            self._add_batch(batch, report)
            done += len(batch)
            if progress is not None:
                progress(done)
        return report.finish()

    def resplit(self, progress: Callable[[int], None] | None = None) -> AddReport:
        """Split again what was split by a splitter of another name, e.g. after a change of the model."""
        with self._database.read():
            ids = [info.id for info in self._database.infos(0, -1)]
        return self.add((self.get(document_id) for document_id in ids), progress)

    def delete(self, document_id: str) -> bool:
        """Remove a document and its chunks; False where there is none of this id."""
        with self._database.read():
            if self._database.info(document_id) is None:
                return False
        with self._database.write():
            return self._database.delete(document_id)

    def get(self, document_id: str) -> Document:
        """A document; its text is the ``full_text`` that was split. Raises NotFoundError."""
        info, texts = self._stored(document_id)
        return Document(info.id, "".join(texts), info.title, info.metadata)

    def chunks(self, document_id: str) -> list[Chunk]:
        """A document's chunks in order. Raises NotFoundError."""
        return make_chunks(*self._stored(document_id))

    def documents(self, offset: int = 0, limit: int = 100) -> list[DocumentInfo]:
        """Documents in order of first arrival. Raises InputError for a negative offset or limit."""
        if offset < 0 or limit < 0:
            raise InputError(f"offset = {offset} and limit = {limit} must not be negative", offset=offset, limit=limit)
        with self._database.read():
            return self._database.infos(offset, limit)

    def __len__(self) -> int:
        """The number of documents."""
        return self.stats().documents

    def __contains__(self, document_id: object) -> bool:
        with self._database.read():
            return isinstance(document_id, str) and self._database.info(document_id) is not None

    def stats(self) -> CollectionStats:
        with self._database.read():
            documents, chunks, characters = self._database.totals()
        size = sum(_size(self.folder / name) for name in (DATABASE, f"{DATABASE}-wal", _INDEX))
        return CollectionStats(documents, chunks, characters, self.embedder, size)

    def retrieve(self, query: str, k: int, *, mode: Mode = "fused", filters: Filters | None = None) -> list[Hit]:
        """At most ``k`` chunks, best first; see ``Retriever`` for the contract.

        ``bm25`` ranks chunks that share a word with the query, ``dense`` by cosine, ``fused`` merges the
        first 100 of both by reciprocal rank. A query without words finds nothing in ``bm25``. Raises
        InputError for ``k`` under 1 or an unknown mode, FilterError for a malformed filter.
        """
        if mode not in get_args(Mode):
            raise InputError(f"unknown retrieval mode {mode!r}; choose from {', '.join(get_args(Mode))}", mode=mode)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k = {k!r} is not a positive whole number", k=repr(k))
        compile_filters(filters)  # a malformed filter is an error even where there is nothing to search
        snapshot = self.refresh()
        return snapshot.search(query, k, mode, filters) if snapshot.chunks else []

    def refresh(self) -> Snapshot:
        """Bring the indexes up to date (a no-op where they are) and return them."""
        current = self._snapshot
        if current is not None and current.stamp == self._stamp():
            return current
        with self._build_lock:
            current = self._snapshot
            if current is None or current.stamp != self._stamp():
                self._snapshot = current = self._build()
            return current

    def _build(self) -> Snapshot:
        if self._embedder is None:
            self._embedder = make_embedder(self.embedder)
        with self._database.read():
            stamp = cast(str, self._database.meta("stamp"))
            documents = [(info.metadata, chunks) for info, chunks in self._database.all_chunks()]
        return load_or_build(self.folder / _INDEX, stamp, documents, self._embedder)

    def _stamp(self) -> str | None:
        with self._database.read():
            return self._database.meta("stamp")

    def _stored(self, document_id: str) -> tuple[DocumentInfo, list[str]]:
        with self._database.read():
            info, texts = self._database.info(document_id), self._database.chunk_texts(document_id)
        if info is None or texts is None:
            raise NotFoundError(f"no document {document_id!r} in {self.folder.name}", document=document_id)
        return info, texts

    def _add_batch(self, batch: Sequence[Document], report: _Report) -> None:
        digests: dict[str, bytes] = {}
        for document in batch:
            digest = digests[document.id] = self._digest(document)
            if report.digests.setdefault(document.id, digest) != digest:
                raise DocumentError(
                    f"document {document.id!r} comes twice, with different content; give each its own id",
                    document=document.id,
                )
        with self._database.read():
            known = self._database.digests(list(digests))
        changed = {document.id: document for document in batch if known.get(document.id) != digests[document.id]}
        split = [(document, self.splitter.split_document(document)) for document in changed.values()]
        if split:
            with self._database.write():
                for document, chunks in split:
                    old = self._database.put(document, digests[document.id], chunks)
                    report.put(document.id, old, [chunk.text for chunk in chunks])
        report.keep([name for name in digests if name not in changed])

    def _digest(self, document: Document) -> bytes:
        """A hash of the content; the place where a document is checked."""
        if not document.id or len(document.id) > _MAX_ID or not document.id.isprintable():
            raise DocumentError(
                f"document id {document.id[:80]!r} must have 1 to {_MAX_ID} printable characters",
                document=document.id,
            )
        if not document.text.strip():
            raise DocumentError(f"document {document.id!r} holds no text; leave it out", document=document.id)
        if document.title is not None and len(document.title) > MAX_TITLE:
            raise DocumentError(
                f"the title of document {document.id!r} has over {MAX_TITLE} characters; shorten it",
                document=document.id,
            )
        content = [document.full_text, document.title, document.metadata, self.splitter.name]
        try:
            data = json.dumps(content, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"document {document.id!r} holds half a surrogate pair; decode its text properly",
                document=document.id,
            ) from error
        except (TypeError, ValueError) as error:
            raise DocumentError(
                f"the metadata of document {document.id!r} is not JSON ({error}); use JSON values only",
                document=document.id,
            ) from error
        return hashlib.blake2b(data, digest_size=20).digest()

    def _settle_embedder(self, wanted: str | None) -> str:
        with self._database.read():
            kept = self._database.meta("embedder")
        if kept is None:
            with self._database.write():  # another process may have been first
                kept = self._database.meta("embedder") or wanted or "svd"
                self._database.set_meta("embedder", kept)
        if wanted is not None and wanted != kept:
            raise ConfigError(
                f"collection {self.folder.name} was made with embedder {kept!r}, not {wanted!r}; "
                f"open it with {kept!r} or make a new collection",
                setting="embedder",
                value=wanted,
            )
        return kept


class _Report:
    """Counts while ``add`` runs. A document met twice in one call is reported once, by what came of the first."""

    def __init__(self) -> None:
        self.digests: dict[str, bytes] = {}
        self._outcomes: dict[str, str] = {}
        self._chunks = Counter[str]()

    def put(self, document_id: str, old: Sequence[str] | None, new: Sequence[str]) -> None:
        self._outcomes[document_id] = "added" if old is None else "replaced"
        before, after = Counter(old or ()), Counter(new)
        self._chunks["added"] += (after - before).total()
        self._chunks["removed"] += (before - after).total()

    def keep(self, document_ids: Sequence[str]) -> None:
        for document_id in document_ids:
            self._outcomes.setdefault(document_id, "unchanged")

    def finish(self) -> AddReport:
        def ids(outcome: str) -> tuple[str, ...]:
            return tuple(name for name, own in self._outcomes.items() if own == outcome)

        return AddReport(
            ids("added"), ids("replaced"), ids("unchanged"), self._chunks["added"], self._chunks["removed"]
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches bounded in number and text."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH or characters > _BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
