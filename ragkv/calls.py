"""The REST API as values: what to send, how to read the answer. ``ragkv.client`` adds the I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from ragkv.errors import InputError, RagkvError, ServerError
from ragkv.sse import Decoder, ServerSentEvent
from ragkv.types import (
    Answer,
    CollectionInfo,
    DocumentInfo,
    DocumentLike,
    DocumentOut,
    DoneEvent,
    Event,
    Health,
    IngestReport,
    QueryRequest,
    StoreCheck,
    StoreInfo,
    document_in,
    each_document,
    make_request,
)

Encode = Literal["eager", "lazy"]
NamedFile = tuple[str, IO[bytes]]
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_COLLECTIONS = "/v1/collections"
_JSON = {"Content-Type": "application/json"}
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. ``arguments`` are httpx's; ``accept``: error statuses with an ordinary answer."""

    method: str
    path: str
    parse: Callable[[Any], T]
    arguments: dict[str, Any] = field(default_factory=dict)
    accept: tuple[int, ...] = ()

    def read(self, response: httpx.Response) -> T:
        """The parsed answer. Raises the error it tells, or ServerError when it is not ragkv's."""
        check(response, self.accept)
        try:
            return self.parse(from_json(response.content) if response.content else None)
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"{response.url} did not answer as a ragkv server of this version does: {error}",
                status=response.status_code,
            ) from error


def health() -> Call[Health]:
    return Call("GET", "/health", Health.model_validate, accept=(503,))


def collections() -> Call[list[CollectionInfo]]:
    return Call("GET", _COLLECTIONS, lambda data: _each(CollectionInfo, data["collections"]))


def drop_collection(name: str) -> Call[None]:
    return Call("DELETE", _collection(name), _nothing)


def add_documents(collection: str, documents: Iterable[DocumentLike], encode: Encode | None) -> Call[IngestReport]:
    body = {
        "documents": [
            document_in(given, name).model_dump(exclude_unset=True) for name, given in each_document(documents)
        ],
        "encode": encode,
    }
    return Call("POST", f"{_collection(collection)}/documents", IngestReport.model_validate, _json(body))


def upload(collection: str, files: Iterable[NamedFile], encode: Encode | None) -> Call[IngestReport]:
    parts = {"files": [("files", file) for file in files], "data": {"encode": encode} if encode else None}
    return Call("POST", f"{_collection(collection)}/documents", IngestReport.model_validate, parts)


def documents(collection: str, offset: int, limit: int) -> Call[list[DocumentInfo]]:
    return Call(
        "GET",
        f"{_collection(collection)}/documents",
        lambda data: _each(DocumentInfo, data["documents"]),
        {"params": {"offset": offset, "limit": limit}},
    )


def document(collection: str, document_id: str) -> Call[DocumentOut]:
    return Call("GET", _document(collection, document_id), DocumentOut.model_validate)


def delete_document(collection: str, document_id: str) -> Call[None]:
    return Call("DELETE", _document(collection, document_id), _nothing)


def query(question: str | QueryRequest, fields: Mapping[str, Any]) -> Call[Answer]:
    body = make_request(question, fields).model_dump(exclude_unset=True)
    return Call("POST", "/v1/query", Answer.model_validate, _json(body))


def stream(question: str | QueryRequest, fields: Mapping[str, Any]) -> Call[None]:
    """Its answer is read with EventReader."""
    body = make_request(question, fields).model_dump(exclude_unset=True) | {"stream": True}
    return Call("POST", "/v1/query", _nothing, _json(body))


def cancel(request_id: str) -> Call[None]:
    return Call("DELETE", _request(request_id), _nothing)


def reprioritize(request_id: str, priority: int) -> Call[None]:
    return Call("PATCH", _request(request_id), _nothing, _json({"priority": priority}))


def cache_stats() -> Call[StoreInfo]:
    return Call("GET", "/v1/cache", StoreInfo.model_validate)


def cache_check(fix: bool) -> Call[StoreCheck]:
    return Call("POST", "/v1/cache/check", StoreCheck.model_validate, _json({"fix": fix}))


def cache_clear() -> Call[int]:
    return Call("DELETE", "/v1/cache", lambda data: int(data["removed"]))


class EventReader:
    """The events in a streamed answer's bytes."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._done = False

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that ``piece`` completes. Raises the error an ``error`` event tells."""
        for sent in self._decoder.feed(piece):
            if sent.name == "error":
                raise error_of(sent.data.encode(), None)
            if sent.name in ("sources", "token", "done"):
                event = self._event(sent)
                self._done = isinstance(event, DoneEvent)
                yield event

    def finish(self) -> None:
        """Raises ServerError when the stream ended before its ``done`` event."""
        if not self._done:
            raise ServerError("the stream ended before the answer was complete; ask again")

    def _event(self, sent: ServerSentEvent) -> Event:
        try:
            return _EVENT.validate_json(sent.data)
        except ValidationError as error:
            raise ServerError(f"unreadable {sent.name!r} event: {error}") from error


@contextmanager
def opened(paths: Iterable[str | PathLike[str]]) -> Iterator[list[NamedFile]]:
    """Files, and all files below folders, open and named as they will be documents; hidden ones are skipped.

    Raises InputError when a file cannot be read, there is none, or two have one name.
    """
    files: dict[str, Path] = {}
    for name, path in (pair for p in paths for pair in _named(Path(p))):
        if name in files:
            raise InputError(
                f"{files[name]} and {path} would both be document {name!r}; upload their common folder",
                name=name,
            )
        files[name] = path
    if not files:
        raise InputError("there is no file to upload; name at least one file or a folder that holds some")
    with ExitStack() as stack:
        try:
            handles: list[NamedFile] = [(n, stack.enter_context(p.open("rb"))) for n, p in files.items()]
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}", path=error.filename) from error
        yield handles


def check(response: httpx.Response, accept: tuple[int, ...] = ()) -> None:
    """Raises the error an error answer (already read) tells; an accepted status may tell none."""
    if response.is_success:
        return
    if response.status_code not in accept or _told(response.content) is not None:
        raise error_of(response.content, response.status_code)


def error_of(content: bytes, status: int | None) -> RagkvError:
    """The error an error body tells, as the class of its code; anything else is a ServerError."""
    told = _told(content)
    if told is None:
        return ServerError(f"the server answered with status {status}: {content[:200]!r}", status=status)
    code, message, context = told
    kind = _BY_CODE.get(code, ServerError)
    error = kind(message)
    error.context = context | {"status": status, "code": code} if kind is ServerError else context
    return error


def _told(content: bytes) -> tuple[str, str, dict[str, object]] | None:
    try:
        error = from_json(content)["error"]
        return str(error["code"]), str(error["message"]), dict(error["context"])
    except (ValueError, LookupError, TypeError):
        return None


@contextmanager
def transport_errors(base_url: httpx.URL, *, closed: bool = False) -> Iterator[None]:
    """Failures of the connection as ServerError that says what to do; a client that is ``closed`` has none."""
    if closed:
        raise ServerError(f"this client of {base_url} is closed; make another one", url=str(base_url))
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerError(
            f"no server answers at {base_url} ({error}); start one with `ragkv serve`, or pass its base_url",
            url=str(base_url),
        ) from error
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{base_url} did not answer in time ({type(error).__name__}); pass a longer timeout",
            url=str(base_url),
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"the connection to {base_url} failed: {error}", url=str(base_url)) from error


def _classes(kind: type[RagkvError]) -> Iterator[type[RagkvError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _classes(child)


_BY_CODE = {kind.code: kind for kind in _classes(RagkvError) if kind.__module__ == RagkvError.__module__}


def _collection(name: str) -> str:
    segment = _segment(name)
    if "/" in name:
        raise InputError(f"collection name {name!r} is not valid; it may hold no slash", collection=name)
    return f"{_COLLECTIONS}/{segment}"


def _document(collection: str, document_id: str) -> str:
    return f"{_collection(collection)}/documents/{_segment(document_id)}"


def _request(request_id: str) -> str:
    return f"/v1/requests/{_segment(request_id)}"


def _segment(name: str) -> str:
    """One path segment. Dots alone would be taken for a relative path, so they are escaped too."""
    if not isinstance(name, str) or not name:
        raise InputError(f"a name or id must be text, and not empty; got {name!r}")
    return quote(name, safe="") if name.strip(".") else name.replace(".", "%2E")


def _json(body: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"content": to_json(body, inf_nan_mode="constants"), "headers": _JSON}
    except ValueError as error:
        raise InputError(f"the request cannot be written as JSON: {error}") from error


def _named(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), file


def _each(model: type[M], items: list[Any]) -> list[M]:
    return [model.model_validate(item) for item in items]


def _nothing(_: object) -> None:
    return None
