"""Binding the address, and serving until told to stop."""

from __future__ import annotations

import errno
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from ragkv.config import Settings
from ragkv.errors import ConfigError
from ragkv.server.access import is_loopback
from ragkv.server.app import create_app
from ragkv.server.contract import EngineAPI
from ragkv.server.keys import Keys

GRACE_SECONDS = 10
# Longer than HTTP clients keep idle connections, so that the server never closes one just being reused.
_IDLE_SECONDS = 60
_BACKLOG = 2048


def bind(settings: Settings) -> socket.socket:
    """A listening socket at ``settings.host`` and ``port``; do it before the model is loaded, so that a port
       in use is told at once.
    Raises ConfigError: the address is not loopback and there is no key, is not this machine's, or is in use;
    or keys cannot tell tenants apart.
    """
    host, port = settings.host, settings.port
    family, address = _resolve(host, port)
    if not Keys(settings) and not is_loopback(address[0]):
        raise ConfigError(
            f"host {host!r} is reachable from other machines, and there is no api_key; set RAGKV_API_KEY "
            "(at least 8 characters), give tenants keys, or bind 127.0.0.1",
            setting="api_key",
            host=host,
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Only a listening socket keeps others off a port bound with SO_REUSEADDR.
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_bind(error, host, port) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL a client on this machine reaches the socket by."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(sock: socket.socket, engine: EngineAPI, *, announce: Callable[[str], None] | None = None) -> None:
    """Serve ``engine`` on a bound socket until SIGINT or SIGTERM; running requests get GRACE_SECONDS to finish.

    ``announce`` (default: print) is told the URL once connections are answered. Closes the socket. The engine
    is the caller's to close, which is why a signal makes this return instead of ending the process.
    """
    with sock, _signals_return(), _heap_settled():
        server_for(engine, announce=announce or _print_url).run(sockets=[sock])


def server_for(engine: EngineAPI, *, announce: Callable[[str], None]) -> uvicorn.Server:
    """The HTTP server of an engine, to be run on bound sockets; it stops when its ``should_exit`` is set."""
    config = uvicorn.Config(
        create_app(engine),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return _Server(config, announce)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[str], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            self._announce(url_of(sock))


def _print_url(url: str) -> None:
    print(f"ragkv serves on {url}", flush=True)


@contextmanager
def _heap_settled() -> Iterator[None]:
    """What is there by now stays as long as the server, so no collection looks at it: one over all objects of a loaded
    model would stop every thread, in the middle of somebody's answer."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _signals_return() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again when it is done; nothing is left to stop then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not a name or address; pass --host 127.0.0.1", setting="host") from error
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]


def _cannot_bind(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} is in use; pass --port", setting="port", port=port)
    if error.errno == errno.EACCES:
        return ConfigError(f"no permission to bind port {port}; pass --port 1024 or higher", setting="port", port=port)
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"host {host!r} is not an address of this machine; pass --host", setting="host", host=host)
    return ConfigError(f"cannot bind {host}:{port}: {error.strerror}", setting="host", host=host, port=port)
