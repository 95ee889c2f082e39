"""Redis as a remote tier, against a real server."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading

import numpy as np
import pytest
from redis.exceptions import InvalidResponse

from ragkv.errors import ConfigError, RemoteError, RemoteRefusedError
from ragkv.store.remote import connect, redis
from ragkv.store.remote.redis import RedisTier
from ragkv.store.remote.replies import Replies
from tests.remote_kit import started
from tests.store_kit import key_for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = started(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def tier(server):
    server.client.flushall()
    tier = RedisTier(server.url, timeout=5, transfer_timeout=5)
    yield tier
    tier.close()


def parts_of(i: int, *sizes: int) -> list[memoryview]:
    rng = np.random.default_rng(i)
    return [rng.integers(0, 256, size, dtype=np.uint8).data for size in sizes]


def got(tier, key: bytes, offset: int, nbytes: int) -> bytes | None:
    buffer = memoryview(bytearray(nbytes))
    return bytes(buffer) if tier.get(key, offset, buffer) else None


def test_what_is_put_is_read_back_part_by_part(tier):
    parts = parts_of(1, 4096, 8192, 12288)
    tier.put(key_for(1), parts)
    assert tier.heads([key_for(2), key_for(1)]) == [None, parts[0]]
    assert got(tier, key_for(1), 4096, 8192) == parts[1]
    assert got(tier, key_for(1), 12288, 12000) == parts[2][:12000]
    assert got(tier, key_for(1), 24576, 10) is None
    assert got(tier, key_for(2), 0, 10) is None


def test_large_parts_are_cut_and_come_back_whole(tier, server, monkeypatch):
    monkeypatch.setattr(redis, "PIECE_BYTES", 1000)
    parts = parts_of(1, 4096, 2500)
    tier.put(key_for(1), parts)
    [name] = server.entries()
    assert server.client.hlen(name) == 5 + 3
    assert got(tier, key_for(1), 4096, 2500) == parts[1]
    server.client.hdel(name, "5096")
    assert got(tier, key_for(1), 4096, 2500) is None


def test_what_is_missing_leaves_the_connection_in_use(tier, server):
    tier.put(key_for(1), parts_of(1, 4096))
    before = server.client.info("stats")["total_connections_received"]
    assert [got(tier, key_for(1 + i % 2), 0, 4096) for i in range(6)] == [parts_of(1, 4096)[0], None] * 3
    assert server.client.info("stats")["total_connections_received"] <= before + 1


def test_a_key_of_another_kind_is_refused_and_the_next_question_answered(tier, server):
    tier.put(key_for(1), parts_of(1, 4096))
    server.client.set(redis._name(key_for(2)), "text")
    with pytest.raises(RemoteRefusedError, match="WRONGTYPE"):
        got(tier, key_for(2), 0, 4096)
    assert got(tier, key_for(1), 0, 4096) == parts_of(1, 4096)[0]


def replied(sent: bytes, nbytes: int, count: int = 1, *, by: int = 1 << 20, seconds: float = 5) -> tuple[bool, bytes]:
    """What is made of a reply that arrives ``by`` bytes at a time, the connection being closed behind it."""
    ours, theirs = socket.socketpair()
    buffer = memoryview(bytearray(nbytes))

    def send():
        with theirs, contextlib.suppress(OSError):
            for start in range(0, len(sent), by):
                theirs.sendall(sent[start : start + by])

    sender = threading.Thread(target=send)
    sender.start()
    with ours:
        try:
            return Replies(ours, seconds).values_into(buffer, count), bytes(buffer)
        finally:
            ours.close()
            sender.join()


@pytest.mark.parametrize("by", [1, 3, 1000])
@pytest.mark.parametrize(
    ("sent", "whole"),
    [
        (b"*2\r\n$5\r\nab\r\nc\r\n$3\r\ndef\r\n", True),
        (b"*2\r\n$5\r\nab\r\nc\r\n$90\r\ndef" + b"!" * 87 + b"\r\n", True),
        (b"*2\r\n$5\r\nab\r\nc\r\n$2\r\nde\r\n", False),
        (b"*2\r\n$-1\r\n$8\r\nab\r\ncdef\r\n", False),
        (b"*2\r\n$5\r\nab\r\nc\r\n$-1\r\n", False),
    ],
)
def test_replies_in_pieces_of_any_size(sent, whole, by):
    ok, buffer = replied(sent, 8, 2, by=by)
    assert ok is whole
    assert not whole or buffer == b"ab\r\ncdef"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"*1\r\n$8\r\nabcd",
        b"*1\r\n$8\r\nabcdefgh\r",
        b"*2\r\n$8\r\nabcdefgh\r\n",
        b"*1\r\n$x\r\n",
        b"+OK\r\n",
        b"\r\n",
        b"x" * 200_000,
    ],
)
def test_what_is_no_such_reply_is_an_error(sent):
    with pytest.raises((InvalidResponse, OSError)):
        replied(sent, 8)


def test_a_reply_in_drips_ends_in_time():
    with pytest.raises(TimeoutError):
        replied(b"*1\r\n$100000\r\n" + bytes(100_000), 100_000, by=10, seconds=0)


def test_names_hold_the_version_and_the_key_only(tier, server):
    tier.put(key_for(1), parts_of(1, 4096))
    assert server.entries() == [f"ragkv:1:{{{key_for(1).hex()}}}"]
    assert server.client.ttl(server.entries()[0]) == -1


def test_parts_may_be_overwritten_once_the_next_is_asked_for(tier):
    def reused():
        buffer = np.empty(4096, np.uint8)
        for value in (1, 2, 3):
            buffer[:] = value
            yield buffer.data

    tier.put(key_for(1), reused())
    assert [got(tier, key_for(1), 4096 * i, 1) for i in range(3)] == [b"\1", b"\2", b"\3"]


def test_an_upload_that_breaks_off_is_never_seen_and_expires(tier, server):
    seen = []

    def broken():
        yield from parts_of(1, 4096, 8192)
        seen.extend(tier.heads([key_for(1)]))
        [upload] = server.entries()
        assert 0 < server.client.ttl(upload) <= redis.UPLOAD_SECONDS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tier.put(key_for(1), broken())
    assert seen == [None]
    assert server.entries() == []


def test_an_upload_that_was_evicted_halfway_is_not_published(tier, server):
    def evicted():
        yield from parts_of(1, 4096)
        server.client.flushall()
        yield from parts_of(2, 8192)

    with pytest.raises(RemoteRefusedError, match="memory"):
        tier.put(key_for(1), evicted())
    assert tier.heads([key_for(1)]) == [None]
    assert server.entries() == []


def test_of_two_uploads_the_first_stays(tier, server):
    tier.put(key_for(1), parts_of(1, 4096, 4096))
    tier.put(key_for(1), parts_of(2, 4096))
    assert tier.heads([key_for(1)]) == parts_of(1, 4096)
    assert got(tier, key_for(1), 4096, 4096) is not None
    assert len(server.entries()) == 1


def test_delete(tier, server):
    tier.put(key_for(1), parts_of(1, 4096))
    tier.delete([key_for(1), key_for(2)])
    assert server.entries() == []


def test_a_full_server_refuses(tier, server):
    server.client.config_set("maxmemory", "2mb")
    try:
        with pytest.raises(RemoteRefusedError, match="memory"):
            tier.put(key_for(1), parts_of(1, 4096, *[500_000] * 8))
        tier.ping()
    finally:
        server.client.config_set("maxmemory", "0")
    assert server.entries() == []


def test_nobody_there_is_a_remote_error(tmp_path):
    tier = RedisTier(f"unix://{tmp_path}/none.sock", timeout=1, transfer_timeout=1)
    with pytest.raises(RemoteError, match=r"none\.sock"):
        tier.ping()
    tier.close()


def test_a_socket_a_database_and_valkey_urls(server, tmp_path):
    for url in (server.url.replace("/0", "/3"), server.url.replace("redis:", "valkey:").replace("/0", "?db=3")):
        tier = connect(url, timeout=5, transfer_timeout=5)
        tier.put(key_for(3), parts_of(1, 4096))
        tier.close()
    assert server.client.info("keyspace")["db3"]["keys"] == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, for a certificate")
def test_over_tls_large_parts_come_back_whole_and_strangers_are_refused(tmp_path):
    make = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=localhost"
    files = ["-keyout", "key.pem", "-out", "cert.pem", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make.split(), *files], cwd=tmp_path, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"port": port, "cert-file": tmp_path / "cert.pem", "key-file": tmp_path / "key.pem", "auth-clients": "no"}
    server = started(tmp_path, *(str(word) for name, value in options.items() for word in (f"--tls-{name}", value)))
    url = f"rediss://127.0.0.1:{port}/0"
    trusting = RedisTier(f"{url}?ssl_ca_certs={tmp_path}/cert.pem", timeout=5, transfer_timeout=5)
    strict = RedisTier(url, timeout=5, transfer_timeout=5)
    try:
        parts = parts_of(1, 4096, 5_000_000)
        trusting.put(key_for(1), parts)
        assert got(trusting, key_for(1), 4096, 5_000_000) == parts[1]
        assert trusting.name == url
        with pytest.raises(RemoteError, match=r"(?i)certificate"):
            strict.ping()
    finally:
        trusting.close()
        strict.close()
        server.kill()


def test_a_password_opens_the_door_and_is_never_shown(tmp_path):
    server = started(tmp_path)
    try:
        server.client.acl_setuser("ann", enabled=True, passwords=["+s3cr3t/x"], keys=["*"], commands=["+@all"])
        server.client.acl_setuser("default", enabled=True, reset_passwords=True, passwords=["+other"])
        for password in ("s3cr3t%2Fx", "wr0ng"):
            url = server.url.replace("//", f"//ann:{password}@")
            tier = RedisTier(url, timeout=5, transfer_timeout=5)
            assert tier.name == server.url
            if password == "wr0ng":
                with pytest.raises(RemoteError) as error:
                    tier.ping()
                assert not re.search(r"\bann\b|wr0ng", f"{error.value} {error.value.context}")
            else:
                tier.ping()
            tier.close()
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url",
    [
        "s3cr3t",
        "http://:s3cr3t@host",
        "redis://:s3cr3t/x@host:6379/0",
        "redis://user/s3cr3t@host",
        "redis://:pw@host:s3cr3t",
        "redis://:s3cr3t@host/0?socket_timeout=1000",
        "redis://:s3cr3t@host/0?decode_responses=1",
        "redis://:s3cr3t@[host/0",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="remote_url") as error:
        connect(url, timeout=1, transfer_timeout=1)
    assert "s3cr3t" not in f"{error.value} {error.value.context} {error.value.__cause__}"
