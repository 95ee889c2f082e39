"""Documents at the door: what a caller sends becomes a document for the retrievers, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from blake3 import blake3

from ragkv.errors import DocumentError, NotFoundError
from ragkv.retrievers import Catalog, Collection, Document
from ragkv.types import CollectionInfo, DocumentIn, DocumentInfo


def to_document(sent: DocumentIn) -> Document:
    """A caller's document; without an id it is named by its content.

    Raises:
        DocumentError: the id is empty.
    """
    if sent.id == "":
        raise DocumentError("the document's id is empty; leave it out to have one derived from the content")
    identity = sent.id or blake3(f"{sent.title or ''}\0{sent.text}".encode()).hexdigest(8)
    return Document(identity, sent.text, sent.title, sent.metadata)


def collection_infos(catalog: Catalog) -> list[CollectionInfo]:
    """All collections, by name."""
    infos = []
    for name in catalog.names():
        with suppress(NotFoundError):  # dropped meanwhile
            stats = catalog.open(name).stats()
            infos.append(CollectionInfo(name=name, documents=stats.documents, chunks=stats.chunks))
    return infos


def document_infos(collection: Collection, offset: int, limit: int) -> list[DocumentInfo]:
    """``limit`` documents behind the first ``offset``."""
    return [
        DocumentInfo(
            id=info.id,
            title=info.title,
            metadata=dict(info.metadata),
            chunks=info.chunks,
            characters=info.characters,
        )
        for info in collection.documents(offset, limit)
    ]


def name_of(given: Any, place: str) -> str:
    """What to call a document that cannot be used: by its id if it has one, else by its ``place``."""
    name = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
    return name if isinstance(name, str) and name else place


def checked(document: Document, *, max_bytes: int) -> Document:
    """The document itself.

    Raises:
        DocumentError: it holds no text, text that is not Unicode, or more than ``max_bytes`` of UTF-8.
    """
    name = {"document_id": document.id}
    if not document.text.strip():
        raise DocumentError(f"document {document.id!r} holds no text; leave it out", **name)
    try:
        size = len(document.text.encode())
    except UnicodeEncodeError:
        raise DocumentError(
            f"document {document.id!r} holds lone surrogates, which are not text; send valid UTF-8", **name
        ) from None
    if size > max_bytes:
        raise DocumentError(
            f"document {document.id!r} has {size:,} bytes, the limit is {max_bytes:,}; split it or raise "
            "max_document_bytes",
            **name,
            bytes=size,
            limit=max_bytes,
        )
    return document


def distinct(documents: Iterable[Document], on_error: Callable[[DocumentError], None]) -> Iterator[Document]:
    """Documents in order, but those whose id an earlier one with other content has: for each of them ``on_error`` gets
    an error that names it. One would replace the other, and nobody could say which was meant."""
    first: dict[str, Document] = {}
    for document in documents:
        if first.setdefault(document.id, document) == document:
            yield document
        else:
            on_error(
                DocumentError(
                    f"document {document.id!r} comes twice, with different content, and only the first is taken; give "
                    "each its own id (a file's is its path below the folder you name: name one that holds both)",
                    document_id=document.id,
                )
            )
