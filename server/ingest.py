"""Documents from a request into the engine: good ones go in, bad ones are listed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from ragkv.documents import checked, name_of, to_document
from ragkv.errors import DocumentError, InputError, RagkvError
from ragkv.retrievers import Document, load_bytes
from ragkv.server.contract import EncodeMode, EngineAPI
from ragkv.server.errors import invalid
from ragkv.server.upload import UploadedFile
from ragkv.types import DocumentIn, IngestReport, RejectedDocument, each_document


@dataclass
class Batch:
    """The documents of one request, and why others of it are not among them."""

    documents: list[Document] = field(default_factory=list)
    refused: list[tuple[str, RagkvError]] = field(default_factory=list)

    @classmethod
    def from_json(cls, items: Sequence[Any], max_bytes: int) -> Batch:
        batch = cls()
        for place, item in each_document(items):
            try:
                batch.documents.append(checked(to_document(DocumentIn.model_validate(item)), max_bytes=max_bytes))
            except ValidationError as error:
                batch._refuse(name_of(item, place), invalid(error))
            except RagkvError as error:
                batch._refuse(name_of(item, place), error)
        return batch

    @classmethod
    def from_files(cls, files: Iterable[UploadedFile], max_bytes: int) -> Batch:
        """Blocking: reads the files."""
        batch = cls()
        for file in files:
            refuse = partial(batch._refuse, file.name)
            try:
                batch.documents += load_bytes(file.name, file.read(), max_bytes=max_bytes, on_error=refuse)
            except RagkvError as error:
                refuse(error)
        return batch

    def _refuse(self, name: str, error: RagkvError) -> None:
        self.refused.append((name, error))


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
