"""``/v1/collections``: collections and their documents."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from ragkv.server.body import media_type, read_json
from ragkv.server.ingest import Batch, ingest
from ragkv.server.openapi import documents_body
from ragkv.server.service import ServiceDep
from ragkv.server.upload import receive_upload
from ragkv.server.wire import CollectionList, DocumentList, DocumentsBody
from ragkv.types import DocumentOut, IngestReport

router = APIRouter(prefix="/v1/collections", tags=["documents"])

Offset = Annotated[int, Query(ge=0, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("")
async def collections(service: ServiceDep) -> CollectionList:
    """All collections."""
    return CollectionList(collections=await service.short(service.engine.collections))


@router.delete("/{collection}", status_code=204)
async def drop_collection(collection: str, service: ServiceDep) -> None:
    """Drop a collection with its documents and indexes."""
    await service.short(service.engine.drop_collection, collection)


@router.post("/{collection}/documents", openapi_extra=documents_body())
async def add_documents(collection: str, request: Request, service: ServiceDep) -> IngestReport:
    """Add or replace documents, sent as JSON or as uploaded files; the collection is made at need."""
    max_bytes = service.engine.settings.max_document_bytes
    if media_type(request) == "multipart/form-data":
        async with receive_upload(request, max_bytes) as upload:
            batch = await service.short(Batch.from_files, upload.files, max_bytes)
            encode = upload.encode
    else:
        body = await read_json(request, DocumentsBody, limit=service.json_limit)
        batch, encode = Batch.from_json(body.documents, max_bytes), body.encode
    return await service.long(ingest, service.engine, collection, batch, encode)


@router.get("/{collection}/documents")
async def documents(collection: str, service: ServiceDep, offset: Offset = 0, limit: Limit = 100) -> DocumentList:
    """A page of a collection's documents, without their texts."""
    page = await service.short(service.engine.documents, collection, offset=offset, limit=limit)
    return DocumentList(documents=page, offset=offset, limit=limit)


@router.get("/{collection}/documents/{document_id:path}")
async def document(collection: str, document_id: str, service: ServiceDep) -> DocumentOut:
    """One document with its text. Its id may hold slashes."""
    return await service.short(service.engine.document, collection, document_id)


@router.delete("/{collection}/documents/{document_id:path}", status_code=204)
async def delete_document(collection: str, document_id: str, service: ServiceDep) -> None:
    """Delete a document."""
    await service.short(service.engine.delete_document, collection, document_id)
