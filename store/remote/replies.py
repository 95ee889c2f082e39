"""A Redis server's replies, large values received straight into the caller's memory.

A client library makes new ``bytes`` of every value and copies them several times on the way; with slabs of megabytes
that takes longer than the transfer.
"""

from __future__ import annotations

import socket
import time

from redis.exceptions import InvalidResponse, ResponseError

LINE_BYTES = 64
"""Received at a time while a line is looked for: what follows it has to be copied."""
SKIPPED_BYTES = 64 << 10


class Replies:
    """Reads what a server sends on ``sock``, in RESP2, for ``seconds`` at most.

    After an error the connection is of no use any more: the rest of the reply would pass for the next one.

    Raises:
        ResponseError: the server answers with an error.
        InvalidResponse: what it sends is no such reply.
        OSError: the connection is closed or broken, or too slow.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._deadline = time.monotonic() + seconds
        self._ahead = b""

    def values_into(self, buffer: memoryview, count: int) -> bool:
        """Fill ``buffer`` with the ``count`` values of one reply, one behind the other; False if that is too little.

        Of a value that is longer than what is left of it the rest is dropped.
        """
        if self._number(b"*") != count:
            raise InvalidResponse(f"the reply does not hold {count} values")
        filled, whole = 0, True
        for _ in range(count):
            length = self._number(b"$")
            if length < 0:
                whole = False
                continue
            part = buffer[filled : filled + length]
            self._fill(part)
            self._skip(length - len(part) + 2)
            filled += len(part)
        return whole and filled == len(buffer)

    def _number(self, kind: bytes) -> int:
        line = self._line()
        if line[:1] == b"-":
            raise ResponseError(line[1:].decode(errors="replace"))
        try:
            if line[:1] == kind:
                return int(line[1:])
        except ValueError:
            pass
        raise InvalidResponse(f"not a reply: {line[:LINE_BYTES]!r}")

    def _line(self) -> bytes:
        scratch = bytearray(LINE_BYTES)
        while b"\r\n" not in self._ahead:
            if len(self._ahead) > SKIPPED_BYTES:
                raise InvalidResponse("a line without an end")
            self._ahead += scratch[: self._receive(memoryview(scratch))]
        line, _, self._ahead = self._ahead.partition(b"\r\n")
        return line

    def _fill(self, buffer: memoryview) -> None:
        filled = min(len(self._ahead), len(buffer))
        buffer[:filled], self._ahead = self._ahead[:filled], self._ahead[filled:]
        while filled < len(buffer):
            filled += self._receive(buffer[filled:])

    def _skip(self, nbytes: int) -> None:
        scratch = memoryview(bytearray(min(nbytes, SKIPPED_BYTES)))
        while nbytes:
            self._fill(scratch[:nbytes])
            nbytes -= min(nbytes, len(scratch))

    def _receive(self, buffer: memoryview) -> int:
        received = self._sock.recv_into(buffer)
        if not received:
            raise ConnectionResetError("the server has closed the connection")
        if time.monotonic() > self._deadline:
            raise TimeoutError("the reply takes too long")
        return received
