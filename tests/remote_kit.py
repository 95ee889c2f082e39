"""Remote tiers for tests: a real redis-server to be killed and frozen, and one in memory that fails when told to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from ragkv.errors import RemoteError

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


class Server:
    """Keeps everything in memory: what is killed comes back empty."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._options = ["--dir", str(folder), "--save", "", "--appendonly", "no", *options]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [str(SERVER), "--bind", "127.0.0.1", "--port", str(self.port), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = Redis(port=self.port)
        for _ in range(500):
            try:
                self.client.ping()
                return
            except RedisError:
                time.sleep(0.01)
        raise RuntimeError("redis-server does not start")

    def kill(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Connections stand and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after :meth:`freeze`; harmless otherwise."""
        self._process.send_signal(signal.SIGCONT)

    def entries(self) -> list[str]:
        return sorted(name.decode() for name in self.client.scan_iter("ragkv:*"))


def started(folder: Path, *options: str) -> Server:
    if SERVER is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a redis-server: apt-get install redis-server")
        pytest.skip("no redis-server here: apt-get install redis-server")
    return Server(folder, *options)


class FakeTier:
    """A tier in memory, with hooks for what a server can do wrong."""

    name = "fake://"

    def __init__(self) -> None:
        self.objects: dict[bytes, bytes] = {}
        self.asked: list[str] = []
        self.before: Callable[[str], object] = lambda method: None
        self.closed = threading.Event()

    def _called(self, method: str) -> None:
        self.asked.append(method)
        self.before(method)

    def ping(self) -> None:
        self._called("ping")

    def heads(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._called("heads")
        return [self.objects[key][:4096] if key in self.objects else None for key in keys]

    def get(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        self._called("get")
        found = self.objects.get(key, b"")[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found) == len(buffer)

    def put(self, key: bytes, parts: Iterable[memoryview]) -> None:
        self._called("put")
        self.objects[key] = b"".join([bytes(part) for part in parts])

    def delete(self, keys: Sequence[bytes]) -> None:
        self._called("delete")
        for key in keys:
            self.objects.pop(key, None)

    def close(self) -> None:
        self.closed.set()

    def down(self, *methods: str) -> None:
        def fail(method: str) -> None:
            if not methods or method in methods:
                raise RemoteError("the plug is out")

        self.before = fail

    def up(self) -> None:
        self.before = lambda method: None
