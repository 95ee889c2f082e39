"""Uploaded files: streamed from the socket to disk, never held whole in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
from aiofiles.tempfile import TemporaryDirectory
from aiofiles.threadpool.binary import AsyncBufferedIOBase
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from ragkv.errors import DocumentError, InputError
from ragkv.server.body import limited
from ragkv.server.contract import EncodeMode

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# All files of one request together, as a multiple of what one may have.
UPLOAD_FACTOR = 16
MAX_FILES = 1000
_MAX_FIELD_BYTES = 1024
_ENCODE: dict[bytes, EncodeMode] = {b"eager": "eager", b"lazy": "lazy"}


@dataclass
class UploadedFile:
    """A file of the request. ``path`` is ours; ``name`` is the client's and is never used as a path.

    The file on disk is cut off at the limit; ``size`` is what was sent.
    """

    name: str
    path: Path
    limit: int
    size: int = 0

    def read(self) -> bytes:
        """Raises DocumentError when more was sent than the limit allows."""
        if self.size > self.limit:
            raise DocumentError(
                f"{self.name} has {self.size:,} bytes, the limit is {self.limit:,}; split it or raise "
                "max_document_bytes",
                path=self.name,
                bytes=self.size,
                limit=self.limit,
            )
        return self.path.read_bytes()


@dataclass
class Upload:
    files: list[UploadedFile] = field(default_factory=list)
    encode: EncodeMode | None = None


@asynccontextmanager
async def receive_upload(request: Request, max_bytes: int) -> AsyncIterator[Upload]:
    """The files of a multipart body (fields ``files`` and ``encode``), on disk while the context lasts.

    Raises InputError for a malformed body or an unknown field, BodyTooLargeError when the files together are
    over UPLOAD_FACTOR times ``max_bytes``. One file over ``max_bytes`` is an error of that file, raised when
    it is read.
    """
    async with TemporaryDirectory(prefix="ragkv-upload-") as folder:
        form = _Form(Path(folder), max_bytes)
        parser = MultipartParser(_boundary(request), form.callbacks())
        try:
            async for piece in limited(request, max_bytes * UPLOAD_FACTOR):
                parser.write(piece)
                await form.advance()
        except FormParserError as error:
            raise InputError(f"malformed multipart body: {error}") from error
        finally:
            await form.close()
        if not form.ended:
            raise InputError("the multipart body ends before its closing boundary; send it whole")
        yield form.upload


def _boundary(request: Request) -> bytes:
    options = parse_options_header(request.headers["content-type"])[1]
    if not options.get(b"boundary"):
        raise InputError("the multipart Content-Type names no boundary; let the HTTP library set this header")
    return options[b"boundary"]


class _Form:
    """Takes the parser's callbacks, which cannot wait, and does their work afterwards, which can."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.upload = Upload()
        self.ended = False
        self._folder = folder
        self._limit = limit
        self._steps: list[tuple[str, bytes]] = []
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._out: AsyncBufferedIOBase | None = None
        self._field: bytearray | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": partial(self._note, "begin"),
            "on_header_field": self._noting("header"),
            "on_header_value": self._noting("value"),
            "on_header_end": partial(self._note, "header_end"),
            "on_headers_finished": partial(self._note, "headers"),
            "on_part_data": self._noting("data"),
            "on_part_end": partial(self._note, "end"),
            "on_end": partial(self._note, "finish"),
        }

    async def advance(self) -> None:
        steps, self._steps = self._steps, []
        for step, data in steps:
            await self._take(step, data)

    async def close(self) -> None:
        if self._out is not None:
            await self._out.close()
            self._out = None

    def _note(self, step: str, data: bytes = b"") -> None:
        self._steps.append((step, data))

    def _noting(self, step: str) -> Callable[[bytes, int, int], None]:
        return lambda data, start, end: self._note(step, data[start:end])

    async def _take(self, step: str, data: bytes) -> None:
        if step == "begin":
            self._disposition = b""
        elif step == "header":
            self._header += data
        elif step == "value":
            self._value += data
        elif step == "header_end":
            if self._header.lower() == b"content-disposition":
                self._disposition = self._value
            self._header = self._value = b""
        elif step == "headers":
            await self._open()
        elif step == "data":
            await self._write(data)
        elif step == "end":
            await self._finish_part()
        else:
            self.ended = True

    async def _open(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"")
        if name == b"encode":
            self._field = bytearray()
        elif name != b"files":
            raise InputError(f"unknown form field {_text(name)!r}; send 'files' and, if wanted, 'encode'")
        elif not (filename := _text(options.get(b"filename", b""))):
            raise InputError("a file was sent without a name; its name tells its type")
        elif len(self.upload.files) == MAX_FILES:
            raise InputError(f"more than {MAX_FILES} files in one request; send them in several")
        else:
            # The client's name is never a path here.
            file = UploadedFile(filename, self._folder / str(len(self.upload.files)), self._limit)
            self.upload.files.append(file)
            self._out = await aiofiles.open(file.path, "wb")

    async def _write(self, data: bytes) -> None:
        if self._field is not None:
            self._field += data[: _MAX_FIELD_BYTES - len(self._field)]
        elif self._out is not None:
            file = self.upload.files[-1]
            if room := max(0, self._limit - file.size):
                await self._out.write(data[:room])
            file.size += len(data)

    async def _finish_part(self) -> None:
        await self.close()
        if self._field is not None:
            mode, self._field = bytes(self._field), None
            if mode not in _ENCODE:
                raise InputError(f"encode: {_text(mode)!r} is not 'eager' or 'lazy'")
            self.upload.encode = _ENCODE[mode]


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError("a form field or file name is not valid UTF-8") from error
