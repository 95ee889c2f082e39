"""What a remote store must be able to do, and which one a URL means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ragkv.errors import ConfigError, MissingExtraError

HEAD_BYTES = 64 << 10
"""What is read of an object to learn whether it is there; an entry whose header is longer is not put."""

Bytes = bytes | memoryview


class RemoteTier(Protocol):
    """Objects by chunk key, on a server that others may share: Redis, an S3-compatible store, …

    An object is an entry's file, byte for byte: promotion is copying it, and who reads it verifies it by its
    own header. Objects are content-addressed, so nothing is ever changed. They may vanish at any moment, as a whole.

    Every method may be called from any number of threads at once, and should return, or raise, within the
    timeouts that the tier was made with. The callers wait no longer than that in any case: what a method does
    after it is for nothing, and must end by itself. Connecting happens inside these methods, never before.

    Raises:
        RemoteError: the server cannot be reached, or not in time.
        RemoteRefusedError: it answers with an error.
    """

    @property
    def name(self) -> str:
        """Where it is, for messages; without user or password."""
        ...

    def ping(self) -> None:
        """Return if the server answers, and lets us in."""
        ...

    def heads(self, keys: Sequence[bytes]) -> list[Bytes | None]:
        """The beginning of each object in one round trip, None where there is none.

        At least its first part or its first ``HEAD_BYTES`` bytes, whichever is less.
        """
        ...

    def get(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with the bytes from ``offset`` on, where a part begins; False if they are not there any more.

        Nobody else uses ``buffer`` before this returns, however long that takes.
        """
        ...

    def put(self, key: bytes, parts: Iterable[memoryview]) -> None:
        """Store an object: ``parts``, one behind the other. Nobody sees it before it is whole; one that is there stays.

        Parts are taken in turn, and one may be overwritten once the next is asked for. The first is the
        entry's header, and later reads begin where a part begins: a store without ranged reads may keep the
        parts as they come. An upload that is broken off leaves nothing behind for long.
        """
        ...

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove objects, those that are there."""
        ...

    def close(self) -> None:
        """Drop all connections. Calls under way end soon, with a RemoteError."""
        ...


def connect(url: str, *, timeout: float, transfer_timeout: float) -> RemoteTier:
    """The tier that ``url`` names; nothing is contacted yet. Timeouts in seconds: of a question, of a slab.

    Raises:
        ConfigError: no such scheme, or the URL cannot be understood. The message does not repeat it.
        MissingExtraError: the client library is not installed.
    """
    try:
        from ragkv.store.remote.redis import SCHEMES, RedisTier
    except ModuleNotFoundError as error:
        message = "a remote tier needs the redis package: pip install 'ragkv[remote]'"
        raise MissingExtraError(message, extra="remote") from error
    if url.partition(":")[0] not in SCHEMES:
        raise ConfigError(
            f"setting 'remote_url': it must begin with {', '.join(f'{s}://' for s in SCHEMES)}", setting="remote_url"
        )
    return RedisTier(url, timeout=timeout, transfer_timeout=transfer_timeout)
