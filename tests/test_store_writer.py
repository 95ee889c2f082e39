from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ragkv.errors import StoreError, StoreFormatError, StoreFullError
from ragkv.store import ChunkStore, Geometry, temp, writer
from ragkv.store.files import Folder
from ragkv.store.ranked import RankedExecutor
from tests.store_kit import disk_usage, key_for

GEOMETRY = Geometry(layers=7, kv_heads=2, head_dim=32, dtype="bfloat16")
TOKENS = 61  # slabs of 15,616 bytes in 16,384
SLAB = GEOMETRY.slab_bytes(TOKENS)


@pytest.fixture(autouse=True)
def small_writes(monkeypatch):
    """Several writes an entry, the last one not full."""
    monkeypatch.setattr(writer, "WRITE_BYTES", 2 * 16384 + 1)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def store(root):
    with ChunkStore(root, capacity_bytes=8 << 20, ram_bytes=0) as opened:
        yield opened


def slabs(i: int) -> list[np.ndarray]:
    return list(np.random.default_rng(i).integers(0, 256, (GEOMETRY.layers, SLAB), dtype=np.uint8))


def put(store: ChunkStore, i: int) -> bool:
    return store.put(key_for(i), GEOMETRY, slabs(i), tokens=TOKENS, model="m")


def holds(store: ChunkStore, i: int) -> bool:
    [entry] = store.open([key_for(i)])
    if isinstance(entry, StoreError):
        raise entry
    with entry:
        got = [slab for [slab] in store.open_layers([entry])]
    return all(np.array_equal(a, b) for a, b in zip(got, slabs(i), strict=True))


def body(root: Path, i: int) -> bytes:
    return (root / "entries" / key_for(i).hex()[:2] / f"{key_for(i).hex()}.kv").read_bytes()[4096:]


def refuse_flag(monkeypatch) -> None:
    monkeypatch.setattr(temp, "go_direct", lambda fd: False)


def refuse_writes(monkeypatch) -> None:
    """As a file system that takes the flag and then refuses to write so."""
    real = os.pwrite

    def pwrite(fd, data, at):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)


def short_writes(monkeypatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:5000], at))


@pytest.mark.parametrize("trouble", [refuse_flag, refuse_writes, short_writes])
def test_every_way_of_writing_gives_the_same_file(store, root, monkeypatch, trouble):
    put(store, 1)
    plain = body(root, 1)
    store.delete([key_for(1)])
    trouble(monkeypatch)
    put(store, 1)
    assert body(root, 1) == plain
    assert holds(store, 1)


def test_between_slabs_nothing_of_others_is_written(store, root):
    for i in range(4):
        put(store, i)  # the later ones in the memory of the earlier
        raw = np.frombuffer(body(root, i), np.uint8).reshape(GEOMETRY.layers, 16384)
        assert not raw[:, SLAB:].any()


def test_a_producer_may_use_its_memory_again(store):
    buffer = np.empty(SLAB, np.uint8)

    def produce():
        for slab in slabs(1):
            buffer[:] = slab
            yield buffer

    store.put(key_for(1), GEOMETRY, produce(), tokens=TOKENS, model="m")
    assert holds(store, 1)


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StoreFullError), (errno.EDQUOT, StoreFullError), (errno.EIO, StoreError)]
)
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_write_that_fails_on_its_thread_fails_the_put_and_leaves_nothing(store, root, monkeypatch, code, kind, at):
    put(store, 0)
    calls, lock, real = iter(range(100)), threading.Lock(), os.pwrite

    def pwrite(fd, data, offset):
        with lock:
            number = next(calls)
        if number == at:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    fds = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(kind):
        put(store, 1)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert disk_usage(root) == len(body(root, 0)) + 4096
    assert put(store, 1)
    assert holds(store, 0)
    assert holds(store, 1)


def test_a_producer_that_fails_waits_for_what_is_being_written(store, root):
    def produce():
        yield from slabs(1)[:5]
        raise ZeroDivisionError

    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        store.put(key_for(1), GEOMETRY, produce(), tokens=TOKENS, model="m")
    assert len(os.listdir("/proc/self/fd")) == fds
    assert disk_usage(root) == 0


@pytest.mark.parametrize("wrong", [slabs(1)[:6], [*slabs(1), slabs(1)[0]], []])
def test_another_number_of_slabs_is_refused(store, root, wrong):
    with pytest.raises(StoreFormatError, match="slab"):
        store.put(key_for(1), GEOMETRY, wrong, tokens=TOKENS, model="m")
    assert disk_usage(root) == 0


def test_concurrent_puts_and_their_failures_do_not_touch_each_other(root):
    answers: dict[int, object] = {}

    def work(store: ChunkStore, i: int) -> None:
        def produce():
            yield from slabs(i)[: 3 if i % 4 == 3 else 7]

        try:
            answers[i] = store.put(key_for(i), GEOMETRY, produce(), tokens=TOKENS, model="m")
        except StoreFormatError as error:
            answers[i] = error

    with ChunkStore(root, capacity_bytes=8 << 20, ram_bytes=0) as store:
        threads = [threading.Thread(target=work, args=(store, i)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(16):
            assert isinstance(answers[i], StoreFormatError) if i % 4 == 3 else holds(store, i)
        assert store.check().clean
        assert disk_usage(root) == store.stats().bytes


def test_the_oldest_entry_is_written_first():
    executor, done = RankedExecutor(1, "test"), []
    inside, go = threading.Event(), threading.Event()
    executor.submit(0, lambda: (inside.set(), go.wait(10)))
    inside.wait(10)
    futures = [executor.submit(rank, lambda r=rank: done.append(r)) for rank in (3, 1, 2, 1)]
    go.set()
    for future in futures:
        future.result(10)
    assert done == [1, 1, 2, 3]
    failing = executor.submit(1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    executor.shutdown()


def test_work_refused_by_a_closed_executor_takes_nobodys_turn():
    executor, gate, done = RankedExecutor(1, "test"), threading.Event(), threading.Event()
    executor.submit(1, lambda: gate.wait(20) and None)
    accepted = executor.submit(1, done.set)
    closing = threading.Thread(target=executor.shutdown)
    closing.start()
    while not executor._executor._shutdown:
        threading.Event().wait(0.001)
    with pytest.raises(StoreError, match="closed"):
        executor.submit(0, lambda: None)
    gate.set()
    closing.join()
    assert accepted.done()
    assert done.is_set()


@pytest.mark.parametrize("links", [True, False])
def test_publishing_again_after_a_roll_back(tmp_path, monkeypatch, links):
    """Also where a file without a row stands in the way, and on file systems without hard links."""
    if not links:

        def refused(source: str, _target: str) -> None:
            os.stat(source)
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refused)
    folder = Folder(tmp_path)
    folder.prepare(read_only=False)
    final = Path(folder.entry_path(key_for(1)))
    final.parent.mkdir()
    final.write_bytes(b"an orphan")
    file = temp.TempFile(folder, key_for(1), 8192)
    file.reserve()
    for _ in range(2):
        file.publish()
        assert final.stat().st_size == 8192
        assert os.path.exists(file.path) == links  # the name by which it is counted until it has a row
    file.indexed = True
    file.discard()
    assert final.stat().st_nlink == 1
