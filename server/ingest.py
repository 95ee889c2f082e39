"""Documents from a request into the engine: good ones go in, bad ones are listed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from ragkv.errors import DocumentError, InputError, RagkvError
from ragkv.retrievers import Document, load_bytes
from ragkv.server.contract import EncodeMode, EngineAPI
from ragkv.server.errors import invalid
from ragkv.server.upload import UploadedFile
from ragkv.types import DocumentIn, IngestReport, RejectedDocument


@dataclass
class Batch:
    """The documents of one request, and why others of it are not among them."""

    documents: list[Document] = field(default_factory=list)
    refused: list[tuple[str, RagkvError]] = field(default_factory=list)

    @classmethod
    def from_json(cls, items: Sequence[Any], max_bytes: int) -> Batch:
        batch = cls()
        for number, item in enumerate(items):
            try:
                batch.documents.append(_document(DocumentIn.model_validate(item), max_bytes))
            except ValidationError as error:
                batch.refused.append((_name(item, number), invalid(error)))
            except RagkvError as error:
                batch.refused.append((_name(item, number), error))
        return batch

    @classmethod
    def from_files(cls, files: Iterable[UploadedFile], max_bytes: int) -> Batch:
        """Blocking: reads the files."""
        batch = cls()
        for file in files:
            try:
                batch.documents += load_bytes(file.name, file.read(), max_bytes=max_bytes)
            except RagkvError as error:
                batch.refused.append((file.name, error))
        return batch


def ingest(engine: EngineAPI, collection: str, batch: Batch, encode: EncodeMode | None) -> IngestReport:
    """Ingest a batch. Blocking.

    Raises what was wrong when not one document of the batch could be used, and what the engine raises.
    """
    if not batch.documents:
        raise _nothing_left(batch)
    report = engine.ingest(collection, batch.documents, encode=encode)
    rejected = [
        RejectedDocument(document_id=name, error=error.code, message=error.message) for name, error in batch.refused
    ]
    report = report.model_copy(update={"rejected": rejected + report.rejected})
    if report.rejected and not report.added + report.replaced + report.unchanged:
        raise _none_of(report.rejected)
    return report


def _document(sent: DocumentIn, max_bytes: int) -> Document:
    document = Document(_content_id(sent) if sent.id is None else sent.id, sent.text, sent.title, sent.metadata)
    size = len(sent.text.encode())
    if not document.id:
        raise DocumentError("the document's id is empty; leave it out to have one derived from the content")
    if not sent.text.strip():
        raise DocumentError(f"document {document.id!r} holds no text; leave it out", document_id=document.id)
    if size > max_bytes:
        raise DocumentError(
            f"document {document.id!r} has {size:,} bytes, the limit is {max_bytes:,}; split it or raise "
            "max_document_bytes",
            document_id=document.id,
            bytes=size,
            limit=max_bytes,
        )
    return document


def _content_id(sent: DocumentIn) -> str:
    content = to_json([sent.text, sent.title, sorted(sent.metadata.items())])
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _name(item: Any, number: int) -> str:
    name = item.get("id") if isinstance(item, dict) else None
    return name if isinstance(name, str) and name else f"documents[{number}]"


def _nothing_left(batch: Batch) -> RagkvError:
    if len(batch.refused) == 1:
        return batch.refused[0][1]
    if not batch.refused:
        return InputError("the request holds no document; send at least one")
    return _none_of([RejectedDocument(document_id=n, error=e.code, message=e.message) for n, e in batch.refused])


def _none_of(rejected: list[RejectedDocument]) -> DocumentError:
    first = f"{rejected[0].document_id}: {rejected[0].message}"
    return DocumentError(
        first if len(rejected) == 1 else f"none of {len(rejected)} documents could be used; the first: {first}",
        rejected=[r.model_dump() for r in rejected],
    )
