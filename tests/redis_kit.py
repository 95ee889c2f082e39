"""A real redis-server of a test's own, that can be killed, frozen and started again on the same port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

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
