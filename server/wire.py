"""Bodies that only the REST door has; everything else on the wire is ``ragkv.types``."""

from __future__ import annotations

from pydantic import Field, SkipValidation

from ragkv.server.contract import EncodeMode
from ragkv.types import CollectionInfo, DocumentIn, DocumentInfo, QueryRequest, Wire


class QueryBody(QueryRequest):
    """A query, and whether to answer it as server-sent events."""

    stream: bool = False

    def request(self) -> QueryRequest:
        return QueryRequest.model_validate(self.model_dump(exclude={"stream"}, exclude_unset=True))


class PriorityBody(Wire):
    priority: int = Field(ge=-1000, le=1000, description="lower is sooner")


class Prioritized(PriorityBody):
    id: str


class DocumentsBody(Wire):
    """Documents to add. Each is validated on its own, so that a bad one does not keep the others out."""

    documents: list[SkipValidation[DocumentIn]] = Field(min_length=1)
    encode: EncodeMode | None = None


class CheckBody(Wire):
    fix: bool = False


class CollectionList(Wire):
    collections: list[CollectionInfo]


class DocumentList(Wire):
    """A page of documents, in the order they were added."""

    documents: list[DocumentInfo]
    offset: int
    limit: int


class Cleared(Wire):
    removed: int = Field(description="entries removed, blocks of idle conversations included")
