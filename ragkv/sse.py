"""Server-sent events, both ways: the server encodes, the SDK decodes (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE_END = re.compile("\r\n|\n|\r")
COMMENT = b": keep-alive\n\n"


class ServerSentEvent(NamedTuple):
    name: str
    data: str


def encode(name: str, data: str) -> bytes:
    """One event on the wire. ``data`` may span lines."""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(data))
    return f"event: {name}\n{lines}\n".encode()


class Decoder:
    """Events out of a byte stream that is cut anywhere, also inside a character or between CR and LF.

    Comments, ``id`` and ``retry`` fields and events without data are skipped; an event that the end of the
    stream cuts off is never delivered.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._rest = ""
        self._after_cr = False
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent]:
        """The events that ``piece`` completes."""
        text = self._utf8.decode(piece)
        if not text:
            return
        # A CR ends its line at once; the LF of a CRLF that was cut in two is then skipped.
        complete = self._rest + (text[1:] if self._after_cr and text[0] == "\n" else text)
        self._after_cr = text[-1] == "\r"
        *lines, self._rest = _LINE_END.split(complete)
        for line in lines:
            if (event := self._take(line)) is not None:
                yield event

    def _take(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event = ServerSentEvent(self._name or "message", "\n".join(self._data)) if self._data else None
        self._name, self._data = "", []
        return event
