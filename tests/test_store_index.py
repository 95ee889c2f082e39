from __future__ import annotations

import threading

import pytest

from ragkv.errors import StoreError, StoreReadOnlyError
from ragkv.store.index import Index
from ragkv.store.policies import Lru
from ragkv.store.rows import Row, pack_row, unpack_row
from tests.store_kit import key_for, python

KEYS = [key_for(i) for i in range(200)]


def row(i: int, model: str = "m") -> Row:
    return Row(nbytes=4096 * (i + 1), tokens=i, layers=3, created=1.5, model=model)


@pytest.fixture
def index(tmp_path):
    opened = Index(tmp_path / "index", read_only=False)
    yield opened
    opened.close()


def fill(index: Index, count: int = 5) -> None:
    for i in range(count):
        index.write(lambda txn, i=i: txn.put(KEYS[i], row(i)))


def order(index: Index) -> list[int]:
    return index.read(lambda txn: [KEYS.index(key) for key, _ in Lru().victims(txn)])


def test_many_keys_in_one_look_up(index):
    fill(index)
    found = index.get_many([KEYS[3], KEYS[9], KEYS[0], KEYS[3]])
    assert [r and r.tokens for r in found] == [3, None, 0, 3]


def test_the_order_of_eviction_follows_use(index):
    fill(index)
    for i in (1, 0, 2):
        index.write(lambda txn, i=i: txn.move(KEYS[i], Lru().use(txn, txn.get(KEYS[i]), 1)))
    assert order(index) == [3, 4, 1, 0, 2]
    index.write(lambda txn: txn.put(KEYS[1], row(7)))
    assert order(index) == [3, 4, 1, 0, 2]


def test_rows_may_be_deleted_while_walking_them(index):
    fill(index, 50)

    def evict(txn):
        for key, _ in Lru().victims(txn):
            if KEYS.index(key) % 2:
                txn.delete(key)

    index.write(evict)
    assert order(index) == list(range(0, 50, 2))


def test_tallies_per_model(index):
    fill(index, 2)
    index.write(lambda txn: txn.put(KEYS[5], row(5, "other")))
    assert index.read(lambda txn: txn.models()) == {"m": (2, 3 * 4096), "other": (1, 6 * 4096)}
    assert index.write(lambda txn: [txn.delete(KEYS[5]), txn.delete(KEYS[5])]) == [True, False]
    assert index.read(lambda txn: txn.models()) == {"m": (2, 3 * 4096)}


def test_a_failed_transaction_changes_nothing(index):
    fill(index)

    def fail(txn):
        txn.delete(KEYS[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        index.write(fail)
    assert order(index) == [0, 1, 2, 3, 4]


def test_the_map_grows_under_concurrent_use(tmp_path):
    index = Index(tmp_path / "index", read_only=False, map_bytes=64 << 10)
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for i in range(start, 1000, 4):
                key = key_for(i)
                index.write(lambda txn, key=key: txn.put(key, row(1)))
                if index.get_many([key])[0] is None:
                    raise LookupError(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert index.read(lambda txn: txn.models()) == {"m": (1000, 1000 * 8192)}
    index.close()


def test_another_process_may_grow_the_map(tmp_path):
    index = Index(tmp_path / "index", read_only=False, map_bytes=64 << 10)
    fill(index)
    script = """
import sys
from pathlib import Path
from ragkv.store.index import Index
from ragkv.store.rows import Row
index = Index(Path(sys.argv[1]), read_only=False, map_bytes=16 << 20)
def put(txn):
    for i in range(5000):
        txn.put(i.to_bytes(32, "little"), Row(4096, 1, 1, 0.0, "m"))
index.write(put)
index.close()
"""
    with python(script, tmp_path / "index") as process:
        assert process.wait() == 0
    assert index.get_many([KEYS[0], (77).to_bytes(32, "little")])[1] is not None
    index.write(lambda txn: txn.put(KEYS[7], row(7)))
    index.close()


def test_read_only(tmp_path):
    writer = Index(tmp_path / "index", read_only=False)
    fill(writer)
    writer.close()
    reader = Index(tmp_path / "index", read_only=True)
    assert reader.get_many([KEYS[1]])[0] is not None
    with pytest.raises(StoreReadOnlyError):
        reader.write(lambda txn: txn.delete(KEYS[1]))
    reader.close()


def test_a_closed_index_says_so(index):
    index.close()
    with pytest.raises(StoreError):
        index.get_many(KEYS)


def test_a_damaged_row_is_no_row():
    value = pack_row(KEYS[0], row(3))
    assert unpack_row(KEYS[0], value) == row(3)
    assert unpack_row(KEYS[1], value) is None
    for bit in range(len(value) * 8):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        assert unpack_row(KEYS[0], bytes(damaged)) is None
    assert all(unpack_row(KEYS[0], value[:n]) is None for n in range(len(value)))


def fill_at_once(index: Index) -> None:
    index.write(lambda txn: [txn.put(key_for(i), row(1)) for i in range(1000)])


def test_readers_do_not_keep_the_map_from_growing(tmp_path):
    index = Index(tmp_path / "index", read_only=False, map_bytes=64 << 10)
    grown = threading.Event()

    def look() -> None:
        while not grown.is_set():
            index.read(lambda txn: grown.wait(0.01))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    writer = threading.Thread(target=fill_at_once, args=(index,))
    writer.start()
    writer.join(20)
    stuck = writer.is_alive()
    grown.set()
    for thread in [*threads, writer]:
        thread.join()
    index.close()
    assert not stuck
