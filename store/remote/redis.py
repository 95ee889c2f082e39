"""Redis and Valkey as a remote tier.

An entry is one hash, ``ragkv:<format version>:{<key in hex>}``: each part of the file is a field, named by its offset
in decimal; parts larger than 4 MiB are cut there. So one layer can be read alone, the server evicts entries
whole, and no value comes near its limit of 512 MB. An upload goes to a hash of another name, which expires by
itself, and is renamed when it is whole. The braces keep both names in one slot where keys are spread over servers.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from ragkv.errors import ConfigError, RemoteError, RemoteRefusedError
from ragkv.store.keys import FORMAT_VERSION
from ragkv.store.remote.replies import Replies
from ragkv.store.remote.tier import Bytes

SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
"""URL schemes, and what the client library calls them."""

PIECE_BYTES = 4 << 20
UPLOAD_SECONDS = 300
"""How long the server keeps an upload that nobody goes on with."""


class RedisTier:
    """A :class:`~ragkv.store.remote.tier.RemoteTier` on one Redis or Valkey server.

    Args:
        url: ``redis://user:password@host:6379/0``; with TLS ``rediss://``, on a socket ``unix:///path?db=0``.
        timeout: seconds that questions (and connecting) may take.
        transfer_timeout: seconds that a download may take, and an upload stand still.
    """

    def __init__(self, url: str, *, timeout: float, transfer_timeout: float) -> None:
        self.name = _without_secrets(url)
        self._asking = _client(url, timeout, timeout)
        self._moving = _client(url, timeout, transfer_timeout)
        self._transfer_timeout = transfer_timeout

    def ping(self) -> None:
        with self._errors():
            self._asking.ping()

    def heads(self, keys: Sequence[bytes]) -> list[Bytes | None]:
        with self._errors(), self._asking.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hget(_name(key), "0")
            return list(pipe.execute())

    def get(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        fields = [str(start) for start in range(offset, offset + len(buffer), PIECE_BYTES)]
        with self._errors(), self._connection() as connection:
            connection.send_command("HMGET", _name(key), *fields)
            return Replies(connection._sock, self._transfer_timeout).values_into(buffer, len(fields))

    def put(self, key: bytes, parts: Iterable[memoryview]) -> None:
        name = _name(key)
        upload = f"{name}:{secrets.token_hex(8)}"
        offset = fields = 0
        with self._errors():
            try:
                for part in parts:
                    view = part.cast("B")
                    while view:
                        self._put_piece(upload, offset, view[:PIECE_BYTES])
                        offset, fields = offset + len(view[:PIECE_BYTES]), fields + 1
                        view = view[PIECE_BYTES:]
                self._publish(upload, name, fields)
            except BaseException:
                with contextlib.suppress(RedisError, OSError):
                    self._asking.unlink(upload)
                raise

    def delete(self, keys: Sequence[bytes]) -> None:
        with self._errors():
            self._asking.unlink(*map(_name, keys))

    def close(self) -> None:
        for client in (self._asking, self._moving):
            client.connection_pool.disconnect(inuse_connections=True)
            client.close()

    def _put_piece(self, upload: str, offset: int, piece: memoryview) -> None:
        with self._moving.pipeline(transaction=True) as pipe:
            pipe.hset(upload, str(offset), piece)
            pipe.expire(upload, UPLOAD_SECONDS)
            pipe.execute()

    def _publish(self, upload: str, name: str, fields: int) -> None:
        # It may have been evicted halfway, and begun anew by its next piece.
        if self._moving.hlen(upload) != fields:
            raise RemoteRefusedError(f"{self.name} dropped the upload; give it more memory", remote=self.name)
        with self._moving.pipeline(transaction=True) as pipe:
            # The first one stays: under a reader's eyes another machine's bytes would look like damage.
            pipe.renamenx(upload, name)
            pipe.persist(name)
            [fresh, _] = pipe.execute()
        if not fresh:
            self._moving.unlink(upload)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        pool = self._moving.connection_pool
        connection: Any = pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ResponseError as error:
            raise RemoteRefusedError(f"{self.name} refuses: {error}", remote=self.name) from error
        except (RedisError, OSError) as error:
            raise RemoteError(f"{self.name} cannot be used: {error}", remote=self.name) from error


def _name(key: bytes) -> str:
    return f"ragkv:{FORMAT_VERSION}:{{{key.hex()}}}"


def _client(url: str, connect_timeout: float, timeout: float) -> Redis:
    scheme, rest = url.split(":", 1)
    options: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": timeout,
        "protocol": 2,
        # Trying again is the circuit breaker's business: here it would only multiply the timeouts.
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        return Redis.from_url(f"{SCHEMES[scheme]}:{rest}", **options)
    except (ValueError, TypeError):
        raise _bad_url() from None  # the library's message may repeat the password


def _without_secrets(url: str) -> str:
    """``url`` for messages: scheme, host and database.

    Raises:
        ConfigError: it cannot be understood, or would override what the tier relies on.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        unknown = [name for name, _ in parse_qsl(parts.query) if name != "db" and not name.startswith("ssl_")]
    except ValueError:
        raise _bad_url() from None
    if parts.scheme != "unix" and not re.fullmatch(r"/?\d*", parts.path):
        raise _bad_url()  # an unescaped slash in the password, and what follows it
    if unknown:
        message = f"setting 'remote_url': unknown options {', '.join(unknown)}; it takes db and ssl_… only"
        raise ConfigError(message, setting="remote_url")
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def _bad_url() -> ConfigError:
    return ConfigError(
        "setting 'remote_url' cannot be understood; write redis://user:password@host:6379/0, and the characters "
        "/ @ : # ? % of a password as %2F %40 %3A %23 %3F %25",
        setting="remote_url",
    )
