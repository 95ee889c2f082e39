from __future__ import annotations

import threading

import numpy as np
import pytest

from ragkv.errors import StoreError, StoreReadOnlyError
from ragkv.store.index import Index, is_clean, is_sound
from ragkv.store.rows import Row, pack_row, unpack_row
from tests.store_kit import flip, key_for, python

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
    return index.read(lambda txn: [KEYS.index(key) for key, _ in txn.oldest()])


def test_many_keys_in_one_look_up(index):
    fill(index)
    found = index.get_many([KEYS[3], KEYS[9], KEYS[0], KEYS[3]])
    assert [r and r.tokens for r in found] == [3, None, 0, 3]


def test_the_order_of_eviction_follows_use(index):
    fill(index)
    index.write(lambda txn: txn.touch([KEYS[1], KEYS[9], KEYS[0]]))
    index.write(lambda txn: txn.put(KEYS[2], row(2)))
    assert order(index) == [3, 4, 1, 0, 2]


def test_rows_may_be_deleted_while_walking_them(index):
    fill(index, 50)

    def evict(txn):
        for key, _ in txn.oldest():
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


def test_sound_indexes_pass_and_damaged_ones_do_not(tmp_path):
    path = tmp_path / "index"
    index = Index(path, read_only=False)
    fill(index, 200)
    index.close()
    assert is_clean(path)
    assert is_sound(path)
    whole = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(whole[: len(whole) // 2])
    assert not is_sound(path)
    assert not is_clean(path)
    (path / "data.mdb").write_bytes(b"")
    assert not is_sound(path)


def test_what_passes_the_probe_reads_right(tmp_path):
    """A bit flip is either noticed, or loses no more than the last transaction."""
    path = tmp_path / "index"
    index = Index(path, read_only=False)
    fill(index, 100)
    index.close()
    whole = (path / "data.mdb").read_bytes()
    rng = np.random.default_rng(1)
    noticed = 0
    for bit in rng.integers(0, len(whole) * 8, 12):
        flip(path / "data.mdb", int(bit))
        if is_sound(path):
            with_flip = Index(path, read_only=True)
            found = with_flip.get_many(KEYS[:100])
            assert [r and r.tokens for r in found][:99] == list(range(99))
            with_flip.close()
        else:
            noticed += 1
        (path / "data.mdb").write_bytes(whole)
    assert noticed
