"""What is proven about an index file before LMDB may touch it; the plain twin is py-lmdb's own slow verifier."""

from __future__ import annotations

import os
import random
from pathlib import Path

import lmdb
import pytest

from ragkv.errors import StoreError
from ragkv.store.index import Index, is_clean, mark_clean
from ragkv.store.pages import DamagedPagesError, read_metas, verify
from ragkv.store.rows import Row
from tests.store_kit import flip, key_for, python

NAMES = {b"entries", b"order", b"models"}


def row(i: int) -> Row:
    return Row(nbytes=4096 * (i + 1), tokens=i, layers=3, created=1.5, model=f"m{i % 3}")


def newest(data: Path) -> int:
    return max(meta.txnid for meta in read_metas(data))


def sound(data: Path) -> bool:
    try:
        return verify(data, newest(data)) >= NAMES
    except DamagedPagesError:
        return False


def churned(path: Path, seed: int, steps: int) -> Path:
    """An index that has seen many inserts, deletes, long values and transactions of all sizes."""
    rng = random.Random(seed)
    index = Index(path, read_only=False, map_bytes=1 << 20)
    alive: list[bytes] = []

    def work(txn):
        for _ in range(rng.randrange(1, 60)):
            if alive and rng.random() < 0.45:
                txn.delete(alive.pop(rng.randrange(len(alive))))
            else:
                key = rng.randbytes(32)
                txn.put(key, row(rng.randrange(1000)))
                alive.append(key)

    for _ in range(steps):
        before = list(alive)
        try:
            index.write(work)
        except ZeroDivisionError:
            alive[:] = before
    index.close()
    return path / "data.mdb"


@pytest.mark.parametrize("seed", range(4))
def test_what_lmdb_writes_is_sound(tmp_path, seed):
    data = churned(tmp_path / "index", seed, steps=60 * (seed + 1))
    for meta in read_metas(data):
        if meta.txnid == newest(data):
            assert verify(data, meta.txnid) >= NAMES


def test_long_values_and_free_lists_of_many_pages(tmp_path):
    with lmdb.open(str(tmp_path / "x"), map_size=1 << 26, max_dbs=3) as env:
        db = env.open_db(b"long")
        for size in (0, 1, 2000, 4000, 4096, 100_000, 5_000_000):
            with env.begin(write=True) as txn:
                txn.put(b"k" * (1 + size % 500), b"v" * size, db=db)
        with env.begin(write=True) as txn:
            txn.drop(db, delete=False)
        data = tmp_path / "x" / "data.mdb"
        assert verify(data, newest(data)) == {b"long"}
        with env.begin(write=True) as txn:
            txn.put(b"k", b"v" * 300_000, db=db)
        assert verify(data, newest(data)) == {b"long"}


def test_it_agrees_with_the_plain_verifier(tmp_path):
    """Damaged files: whatever the plain one finds in the newest snapshot, this one finds."""
    plain = pytest.importorskip("lmdb.verify")
    data = churned(tmp_path / "index", 9, steps=25)
    whole = data.read_bytes()
    assert plain.verify(str(data.parent)) == []
    rng = random.Random(3)
    kinds = {True: 0, False: 0}  # by the plain one's verdict
    for n in range(300):
        page = rng.randrange(len(whole) // 4096)
        where = rng.choice([rng.randrange(32), rng.randrange(4096)])
        data.write_bytes(whole)
        flip(data, (page * 4096 + where) * 8 + rng.randrange(8))
        try:
            theirs = not plain.verify(str(data.parent))
        except plain.VerifyError:
            theirs = False
        kinds[theirs] += 1
        if not theirs:
            assert not sound(data), n
    assert min(kinds.values()) > 30


READ = """
import sys
from pathlib import Path
from ragkv.store.index import Index
from ragkv.store.pages import DamagedPagesError
from ragkv.store.rows import Row
from tests.test_store_pages import row
data = Path(sys.argv[1])
whole = data.read_bytes()
for line in sys.stdin:
    bit = int(line)
    raw = bytearray(whole)
    raw[bit // 8] ^= 1 << bit % 8
    data.write_bytes(raw)
    (data.parent / "lock.mdb").unlink(missing_ok=True)
    try:
        index = Index(data.parent, read_only=False, verify=True)
    except DamagedPagesError:
        continue
    index.read(lambda txn: [dict(txn.rows()), txn.models()])
    keys = index.read(lambda txn: txn.keys())
    for n in range(0, len(keys), 40):
        index.write(lambda txn: [txn.delete(key) for key in keys[n : n + 40]])
    for n in range(0, 300, 60):
        index.write(lambda txn: [txn.put(i.to_bytes(32, "big"), row(i)) for i in range(n, n + 60)])
    index.close()
print("alive")
"""


def test_lmdb_survives_whatever_passes(tmp_path):
    """Read, emptied and filled again by LMDB in a child process, so that a crash is seen."""
    data = churned(tmp_path / "index", 5, steps=12)
    rng = random.Random(11)
    pages = data.stat().st_size // 4096
    heads = [(rng.randrange(pages) * 4096 + rng.randrange(48)) * 8 + rng.randrange(8) for _ in range(30)]
    bits = heads + [rng.randrange(pages * 4096 * 8) for _ in range(10)]
    with python(READ, data) as process:
        out, _ = process.communicate("".join(f"{bit}\n" for bit in bits))
    assert (process.returncode, out) == (0, "alive\n")


@pytest.mark.parametrize("keep", [0, 1, 4096, 8192, 0.5])
def test_a_truncated_file_is_not_sound(tmp_path, keep):
    data = churned(tmp_path / "index", 1, steps=10)
    os.truncate(data, keep if isinstance(keep, int) else int(keep * data.stat().st_size))
    assert not sound(data)


def test_only_what_is_sound_is_called_clean(tmp_path):
    data = churned(tmp_path / "index", 2, steps=10)
    assert not is_clean(data.parent)
    mark_clean(data.parent)
    assert is_clean(data.parent)
    root = max(read_metas(data), key=lambda meta: meta.txnid).main.root
    flip(data, (root * 4096 + 12) * 8)
    assert not is_clean(data.parent)
    mark_clean(data.parent)
    assert not is_clean(data.parent)


def test_a_snapshot_is_verified_while_others_write(tmp_path):
    writer = Index(tmp_path / "index", read_only=False)
    script = """
import sys
from pathlib import Path
from ragkv.store.index import Index
for _ in range(40):
    Index(Path(sys.argv[1]), read_only=True, verify=True).close()
"""
    with python(script, tmp_path / "index") as process:
        count = 0
        while process.poll() is None:
            writer.write(lambda txn, n=count: [txn.put(key_for(n % 50), row(1)), txn.delete(key_for((n + 25) % 50))])
            count += 1
        assert process.returncode == 0
    writer.close()


@pytest.mark.parametrize("lost", ["truncated", "deleted"])
def test_an_index_lost_while_open_is_an_error_and_no_crash(tmp_path, lost):
    index = Index(tmp_path / "index", read_only=False)
    index.write(lambda txn: [txn.put(key_for(i), row(i)) for i in range(300)])
    index.get_many([key_for(1)])
    data = tmp_path / "index" / "data.mdb"
    if lost == "deleted":
        data.unlink()
    else:
        os.truncate(data, 8192)
    with pytest.raises(StoreError, match=lost):
        index.get_many([key_for(1)])
    with pytest.raises(StoreError, match=lost):
        index.write(lambda txn: txn.delete(key_for(1)))
    index.close()
    mark_clean(data.parent)
    assert not is_clean(data.parent)
