"""Damage and sudden ends: no wrong byte is ever returned, no other entry is lost, the process survives."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from ragkv.errors import CorruptEntryError, MissingEntryError, StoreError, StoreFormatError
from ragkv.store import ChunkStore, OpenEntry, headers
from tests.store_kit import (
    FILE,
    TOKENS,
    disk_usage,
    entry_file,
    flip,
    holds,
    key_for,
    open_one,
    put,
    python,
    retold,
    sealed,
    slabs_for,
)

MIB = 1 << 20
COUNT = 12


def opened(root: Path, capacity: int = 4 * MIB, **options: object) -> ChunkStore:
    return ChunkStore(root, capacity_bytes=capacity, ram_bytes=MIB, **options)


@pytest.fixture
def root(tmp_path) -> Path:
    """A cleanly closed store of COUNT entries."""
    with opened(tmp_path / "kv") as store:
        for i in range(COUNT):
            put(store, i)
    return tmp_path / "kv"


def unquarantined(root: Path) -> list[int]:
    return [i for i in range(COUNT) if entry_file(root, i).exists()]


# Entry files


def test_a_flipped_bit_in_a_slab_is_an_error_from_there_on(root):
    flip(entry_file(root, 1), (4096 + 8192 + 77) * 8)  # layer 1
    with opened(root) as store:
        entries = store.open([key_for(0), key_for(1)])
        layers = list(store.open_layers(entries, depth=1))
        assert np.array_equal(layers[0][1], slabs_for(1)[0])
        assert all(np.array_equal(layers[n][0], slabs_for(0)[n]) for n in range(3))
        assert isinstance(layers[1][1], CorruptEntryError)
        assert isinstance(layers[2][1], CorruptEntryError)
        assert layers[1][1].context["key"] == key_for(1).hex()
        for entry in entries:
            entry.close()
        assert store.lookup([key_for(0), key_for(1)])[1] is None
        stats = store.stats()
        assert (stats.corrupt, stats.entries, stats.ram_entries) == (1, COUNT - 1, 1)
        assert [p.name for p in (root / "quarantine").iterdir()] == [entry_file(root, 1).name]
        assert put(store, 1)
        assert holds(store, 1)
        assert store.check().clean


def test_random_flips_anywhere_in_a_file_never_give_a_wrong_byte(root):
    rng = np.random.default_rng(3)
    whole = entry_file(root, 1).read_bytes()
    with opened(root) as store:
        for bit in rng.integers(0, FILE * 8, 60):
            entry_file(root, 1).write_bytes(whole)
            store.check(fix=True)
            flip(entry_file(root, 1), int(bit))
            [entry] = store.open([key_for(1)])
            if isinstance(entry, OpenEntry):
                with entry:
                    slabs = [slab for [slab] in store.open_layers([entry])]
                for slab, want in zip(slabs, slabs_for(1), strict=True):
                    assert isinstance(slab, CorruptEntryError) or np.array_equal(slab, want)
            else:
                assert isinstance(entry, CorruptEntryError)
        assert holds(store, 0)


@pytest.mark.parametrize("length", [0, 100, 4096, 4096 + 8192, FILE - 4096, FILE - 1, FILE + 4096])
def test_a_file_of_another_length_is_corrupt(root, length):
    os.truncate(entry_file(root, 1), length)
    with opened(root) as store:
        good, bad = store.open([key_for(0), key_for(1)])
        assert isinstance(bad, CorruptEntryError)
        assert isinstance(good, OpenEntry)
        good.close()
        assert key_for(1) not in store
        assert store.stats().corrupt == 1


def test_a_file_truncated_while_open_is_an_error_not_a_crash(root):
    with opened(root) as store, open_one(store, 1) as entry:
        os.truncate(entry_file(root, 1), 4096 + 8192)
        slabs = [slab for [slab] in store.open_layers([entry], depth=1)]
        assert np.array_equal(slabs[0], slabs_for(1)[0])
        assert all(isinstance(slab, CorruptEntryError) for slab in slabs[1:])


def test_a_disk_that_cannot_read_is_a_corrupt_entry(root, monkeypatch):
    def preadv(*args):
        raise OSError(5, "Input/output error")

    with opened(root) as store, open_one(store, 1) as entry:
        monkeypatch.setattr(os, "preadv", preadv)
        assert all(isinstance(slab, CorruptEntryError) for [slab] in store.open_layers([entry]))
        monkeypatch.undo()


def test_a_header_is_read_again_only_if_the_file_has_changed(root, monkeypatch):
    read_it: list[int] = []
    read_header = headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda fd: read_it.append(fd) or read_header(fd))
    with ChunkStore(root, capacity_bytes=4 * MIB, ram_bytes=0) as store:
        assert holds(store, 1)
        assert holds(store, 1)
        assert len(read_it) == 1
        path = entry_file(root, 1)
        os.utime(path, (1, 1))  # the same bytes: nobody knows
        assert holds(store, 1)
        assert len(read_it) == 2
        flip(path, 100)
        os.utime(path, (2, 2))
        [error] = store.open([key_for(1)])
        assert isinstance(error, CorruptEntryError)
        assert len(read_it) == 3
        put(store, 1)
        assert holds(store, 1)
        store.delete([key_for(1)])
        put(store, 1)
        assert holds(store, 1)
        assert holds(store, 2)
        assert len(read_it) == 6


def test_an_error_keeps_no_lease(root):
    for i, change in ((1, lambda about: about.pop("codec")), (2, lambda about: about.update(codec="new"))):
        path = entry_file(root, i)
        path.write_bytes(retold(path.read_bytes(), change))
    flip(entry_file(root, 3), 100)
    with opened(root) as store:
        some = store.open([key_for(i) for i in range(5)])
        errors = [one for one in some if isinstance(one, StoreError)]
        assert len(errors) == 3
        for one in some:
            if isinstance(one, OpenEntry):
                one.close()
        # Damaged ones are in quarantine; the one for another version is there, and nobody has it open.
        assert store.delete([key_for(i) for i in range(5)]) == 3


def test_a_file_that_cannot_be_looked_at_is_one_chunks_error(root, monkeypatch):
    with opened(root) as store:
        fstat, asked = os.fstat, []

        def stale(fd: int) -> os.stat_result:
            if stat.S_ISREG(fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}") == str(entry_file(root, 1)):
                asked.append(fd)
                if len(asked) > 1:  # its lease asked first
                    raise OSError(errno.ESTALE, "stale file handle")
            return fstat(fd)

        monkeypatch.setattr(os, "fstat", stale)
        first, second = store.open([key_for(0), key_for(1)])
        assert isinstance(first, OpenEntry)
        assert isinstance(second, CorruptEntryError)
        first.close()


def test_only_some_headers_are_remembered(root):
    with ChunkStore(root, capacity_bytes=4 * MIB, ram_bytes=0) as store:
        store._headers = headers.Headers(most=2)
        assert all(holds(store, i) for i in range(4))
        assert len(store._headers._known) == 2
        assert all(holds(store, i) for i in range(4))


def test_an_entry_under_anothers_name_is_refused(root):
    shutil.copy(entry_file(root, 2), entry_file(root, 1))
    with opened(root) as store:
        assert isinstance(store.open([key_for(1)])[0], CorruptEntryError)
        assert holds(store, 2)


def test_read_only_stores_report_corruption_and_move_nothing(root):
    flip(entry_file(root, 1), 5000 * 8)
    with opened(root, read_only=True) as store, open_one(store, 1) as entry:
        assert isinstance(next(iter(store.open_layers([entry])))[0], CorruptEntryError)
        assert store.stats().corrupt == 1
    assert entry_file(root, 1).exists()


def test_the_quarantine_counts_and_leaves_first(tmp_path):
    root = tmp_path / "kv"
    with opened(root, capacity=3 * FILE + 4096) as store:
        for i in range(3):
            put(store, i)
        flip(entry_file(root, 2), 5000 * 8)
        assert store.check(fix=True).corrupt == [key_for(2)]
        assert disk_usage(root) == 3 * FILE
        put(store, 3)
        assert [key_for(i) in store for i in range(4)] == [True, True, False, True]
        assert disk_usage(root) == 3 * FILE


# Entries of another version


def make_foreign(root: Path, i: int, how: str) -> bytes:
    """Entry ``i`` as a later version might have written it; the file's bytes."""
    path = entry_file(root, i)
    raw = path.read_bytes()
    if how == "version":
        raw = sealed(raw[:16] + struct.pack("<I", 2) + raw[20:4096]) + raw[4096:]
    else:
        raw = retold(raw, lambda about: about.update({how: "q4"}))
    path.write_bytes(raw)
    return raw


@pytest.mark.parametrize("how", ["version", "codec", "dtype", "source"])
@pytest.mark.parametrize("index", ["kept", "lost", "row lost"])
def test_an_entry_for_another_version_stays(root, how, index):
    raw = make_foreign(root, 1, how)
    if index == "lost":
        shutil.rmtree(root / "index")
    with opened(root) as store:
        if index == "row lost":
            store._index.write(lambda txn: txn.delete(key_for(1)))
            assert store.check().orphans == [key_for(1)]
            store.check(fix=True)
        [answer] = store.open([key_for(1)])
        assert isinstance(answer, StoreFormatError)
        assert ("version 2" if how == "version" else f"{how} 'q4'") in answer.message
        assert answer.context["key"] == key_for(1).hex()
        for fix in (False, True, False):
            report = store.check(fix=fix)
            assert (report.foreign, report.corrupt, report.clean) == ([key_for(1)], [], True)
        assert not put(store, 1)
        assert all(holds(store, i) for i in range(COUNT) if i != 1)
        stats = store.stats()
        assert (stats.corrupt, stats.entries, stats.bytes) == (0, COUNT, disk_usage(root))
        assert stats.models == ({"m": COUNT} if index == "kept" else {"m": COUNT - 1, "foreign": 1})
    assert entry_file(root, 1).read_bytes() == raw
    assert not list((root / "quarantine").iterdir())


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_an_entry_for_another_version_can_be_evicted_and_deleted(root, index):
    for i in (1, 2):
        make_foreign(root, i, "codec")
    if index == "lost":
        shutil.rmtree(root / "index")
    with opened(root) as store:
        assert store.delete([key_for(2)]) == 1
        assert not entry_file(root, 2).exists()
    with opened(root, capacity=3 * FILE) as store:
        for i in range(100, 104):
            put(store, i)
        assert store.check().foreign == []
    assert not entry_file(root, 1).exists()


def test_the_version_that_can_read_an_entry_corrects_its_row(root):
    whole = entry_file(root, 1).read_bytes()
    make_foreign(root, 1, "codec")
    shutil.rmtree(root / "index")
    opened(root).close()
    entry_file(root, 1).write_bytes(whole)
    with opened(root) as store:
        assert holds(store, 1)
        assert store.check(fix=True).miscounted == [key_for(1)]
        assert store.check().clean
        assert store.lookup([key_for(1)])[0].tokens == TOKENS
        assert store.stats().models == {"m": COUNT}


def test_a_slab_for_another_version_may_be_damaged_for_all_we_know_but_not_its_header(root):
    make_foreign(root, 1, "codec")
    flip(entry_file(root, 1), 8 * 300)
    with opened(root) as store:
        assert store.check(fix=True).corrupt == [key_for(1)]
    assert not entry_file(root, 1).exists()


@pytest.mark.parametrize("spelling", [{"indent": 3}, {"indent": 200}])
def test_another_writers_file_is_an_entry_like_any_other(root, spelling):
    raw = retold(entry_file(root, 1).read_bytes(), lambda about: about.update(later=1), **spelling)
    entry_file(root, 1).write_bytes(raw)
    with opened(root) as store:
        assert holds(store, 1)
        store.check(fix=True)
        assert store.check().clean
        assert store.stats().corrupt == 0
    assert entry_file(root, 1).read_bytes() == raw


# The index


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 8192, 12288, 0.5, 0.9])
def test_a_truncated_index_is_rebuilt(root, keep):
    data = root / "index" / "data.mdb"
    size = data.stat().st_size
    os.truncate(data, keep if isinstance(keep, int) else int(size * keep) // 4096 * 4096)
    with opened(root) as store:
        assert store.stats().entries == COUNT
        assert all(holds(store, i) for i in range(COUNT))
        assert store.check().clean
    with opened(root) as store:
        assert store.stats().entries == COUNT


def test_flipped_bits_in_the_index_lose_nothing(root):
    data = root / "index" / "data.mdb"
    whole = data.read_bytes()
    rng = np.random.default_rng(5)
    for bit in [*rng.integers(0, len(whole) * 8, 15), *rng.integers(0, 2 * 4096 * 8, 5), *range(80, 200, 12)]:
        data.write_bytes(whole)
        flip(data, int(bit))
        with opened(root) as store:
            assert store.check().clean, bit  # and what it waited for is done
            assert all(info is not None for info in store.lookup([key_for(i) for i in range(COUNT)])), bit
        assert len(unquarantined(root)) == COUNT


@pytest.mark.parametrize("lost", ["data.mdb", "lock.mdb", "clean", ""])
def test_a_lost_index_file_is_made_anew(root, lost):
    if lost:
        (root / "index" / lost).unlink()
    else:
        shutil.rmtree(root / "index")
    with opened(root) as store:
        assert store.stats().entries == COUNT
        assert store.check().clean


def test_a_damaged_lock_file_is_harmless(root):
    (root / "index" / "lock.mdb").write_bytes(os.urandom(8192))
    with opened(root) as store:
        assert store.stats().entries == COUNT


def test_rebuilding_quarantines_what_cannot_be_read(root):
    os.truncate(root / "index" / "data.mdb", 4096)
    flip(entry_file(root, 3), 300)
    with opened(root) as store:
        assert store.stats().entries == COUNT - 1
        assert key_for(3) not in store
        assert len(list((root / "quarantine").iterdir())) == 1


def test_a_damaged_index_is_not_repaired_read_only(root):
    os.truncate(root / "index" / "data.mdb", 8192)
    with pytest.raises(StoreFormatError, match="without read_only"):
        opened(root, read_only=True)


@pytest.mark.parametrize("copied", [(), ("lock",), ("index",)])
def test_a_restored_backup_is_opened_for_writing_first(root, tmp_path, copied):
    backup = tmp_path / "backup"
    backup.mkdir()
    for name in ("ragkv-store.json", "entries", *copied):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, backup / name)
    with pytest.raises(StoreFormatError, match="open it once without read_only"):
        opened(backup, read_only=True)
    opened(backup).close()
    with opened(backup, read_only=True) as store:
        assert all(holds(store, i) for i in range(COUNT))


def test_a_damaged_index_is_not_replaced_under_another_process(root):
    with _holder(root) as process:
        shutil.copy(root / "index" / "data.mdb", root / "sound")
        (root / "index" / "data.mdb").rename(root / "theirs")
        (root / "index" / "data.mdb").write_bytes((root / "sound").read_bytes()[:8192])
        with pytest.raises(StoreError, match="another process"):
            opened(root)
        process.kill()
    (root / "sound").unlink()
    (root / "theirs").unlink()
    with opened(root) as store:
        assert store.stats().entries == COUNT


# check


def test_check_finds_and_repairs_both_ways(root):
    with opened(root) as store:
        entry_file(root, 1).unlink()
        flip(entry_file(root, 2), (FILE - 8192 + 5) * 8)
        flip(entry_file(root, 3), 333)
        store._index.write(lambda txn: txn.delete(key_for(4)))
        row = store._index.get_many([key_for(5)])[0]
        store._index.write(lambda txn: txn.put(key_for(5), row._replace(nbytes=1)))
        found = store.check()
        assert not found.clean
        assert (found.missing, sorted(found.corrupt)) == ([key_for(1)], sorted([key_for(2), key_for(3)]))
        assert (found.orphans, found.miscounted) == ([key_for(4)], [key_for(5)])
        assert store.check(fix=True).fixed
        assert store.check().clean
        assert [key_for(i) in store for i in range(7)] == [True, False, False, False, True, True, True]
        assert store.stats().bytes == (COUNT - 3) * FILE
        assert all(holds(store, i) for i in (4, 5))


# Sudden ends and other processes

WRITE = """
import sys
from tests.store_kit import put
from ragkv.store import ChunkStore
root, start, capacity = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import threading
store = ChunkStore(root, capacity_bytes=capacity, ram_bytes=0)
def work(n):
    for i in range(start + n, start + 4000, 2):
        put(store, i)
        print(i, flush=True)
threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
print("open", flush=True)
[t.start() for t in threads]
[t.join() for t in threads]
"""

HOLD = """
import sys
from tests.store_kit import open_one, put
from ragkv.store import ChunkStore
store = ChunkStore(sys.argv[1], capacity_bytes=4 << 20, ram_bytes=0)
entry = open_one(store, 0)
print("open", flush=True)
sys.stdin.readline()
put(store, 500)
print("put", flush=True)
sys.stdin.readline()
"""


def _holder(root: Path):
    process = python(HOLD, root)
    assert process.stdout.readline() == "open\n"
    return process


def test_killed_in_the_middle_of_writing(root):
    rng = np.random.default_rng(7)
    written: set[int] = set(range(COUNT))
    for attempt in range(6):
        with python(WRITE, root, 1000 * (attempt + 1), 1 << 30) as process:
            assert process.stdout.readline() == "open\n"
            time.sleep(float(rng.uniform(0.005, 0.08)))
            process.send_signal(signal.SIGKILL)
            written.update(int(line) for line in process.stdout.read().split("\n")[:-1])
        with opened(root, capacity=1 << 30) as store:
            assert all(info is not None for info in store.lookup([key_for(i) for i in written]))
            assert store.check().clean
            assert disk_usage(root) == store.stats().bytes
            assert not list((root / "tmp").iterdir())
    with opened(root, capacity=1 << 30) as store:
        assert all(holds(store, i) for i in written)


def test_killed_while_evicting_keeps_the_cap(root):
    rng = np.random.default_rng(8)
    capacity = 6 * FILE
    for attempt in range(6):
        with python(WRITE, root, 1000 * (attempt + 1), capacity) as process:
            assert process.stdout.readline() == "open\n"
            time.sleep(float(rng.uniform(0.005, 0.08)))
            process.send_signal(signal.SIGKILL)
        assert disk_usage(root) <= max(capacity, COUNT * FILE if attempt == 0 else 0)
        with opened(root, capacity=capacity) as store:
            report = store.check(fix=True)
            assert not report.corrupt
            assert store.check().clean
            assert store.stats().bytes == disk_usage(root) <= capacity


@pytest.mark.parametrize("target", ["itself", "another", "nowhere"])
def test_a_link_is_never_followed_and_stops_nothing(root, target):
    """One where an entry's file should be: a miss, which `check` reports and `put` replaces."""
    place = entry_file(root, 3)
    elsewhere = {"itself": place, "another": entry_file(root, 4), "nowhere": root / "nowhere"}[target]
    with opened(root) as store:
        place.unlink()
        place.symlink_to(elsewhere)
        [entry] = store.open([key_for(3)])
        assert isinstance(entry, MissingEntryError)
        assert key_for(3) not in store
        assert store.check().corrupt == [key_for(3)]
        assert put(store, 3)
        assert not place.is_symlink()
        assert holds(store, 3)
        store._index.write(lambda txn: [txn.delete(key_for(i)) for i in range(COUNT)])
        place.unlink()
        place.symlink_to(elsewhere)
    (root / "index" / "clean").unlink()
    with opened(root) as store:
        store._session.wait_reconciled()
        assert store.check().clean
        assert store.stats().entries == COUNT - 1
        assert all(holds(store, i) for i in range(COUNT) if i != 3)


def test_a_file_that_cannot_be_opened_keeps_no_other_from_being_counted(root, monkeypatch):
    bad, real = str(entry_file(root, 3)), os.open

    def refusing(path, *args, **options):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    with opened(root) as store:
        store._index.write(lambda txn: [txn.delete(key_for(i)) for i in range(COUNT)])
    (root / "index" / "clean").unlink()
    monkeypatch.setattr(os, "open", refusing)
    with opened(root) as store:
        assert store.check().clean
        assert store.stats().entries == COUNT - 1
    assert [path.name for path in (root / "quarantine").iterdir()] == [entry_file(root, 3).name]


def test_a_lease_binds_other_processes_and_dies_with_its_owner(root):
    with _holder(root) as process, opened(root) as store:
        assert store.delete([key_for(0)]) == 0
        assert store.clear() == COUNT - 1
        assert holds(store, 0)
        process.kill()
        process.wait()
        assert store.delete([key_for(0)]) == 1


def test_two_processes_see_each_others_entries(root):
    with _holder(root) as process, opened(root) as store:
        put(store, 400)
        assert key_for(500) not in store
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "put\n"
        assert holds(store, 500)
        assert store.check().clean
        store.delete([key_for(500)])
        process.kill()


def test_what_another_process_deleted_leaves_ram_too(root):
    with opened(root) as store:
        assert holds(store, 3)
        script = "import sys; from ragkv.store import ChunkStore; from tests.store_kit import key_for\n"
        script += "with ChunkStore(sys.argv[1], capacity_bytes=4 << 20, ram_bytes=0) as s: s.delete([key_for(3)])"
        with python(script, root) as process:
            assert process.wait() == 0
        assert store.lookup([key_for(3)]) == [None]
        assert store.stats().ram_entries == 0


def test_a_dead_writers_space_is_taken_back_while_the_store_is_open(root):
    with opened(root, capacity=(COUNT + 1) * FILE + 4096) as store:
        name = f"{key_for(77).hex()}.0123456789abcdef"
        (root / "tmp" / name).write_bytes(bytes(FILE))  # its writer's lock died with it
        assert put(store, 78)
        assert store.stats().entries == COUNT + 1
        assert disk_usage(root) == (COUNT + 1) * FILE


def test_an_entry_published_but_not_indexed_is_taken_in(root):
    name = f"{key_for(3).hex()}.0123456789abcdef"
    with opened(root) as store:
        store._index.write(lambda txn: txn.delete(key_for(3)))
    os.link(entry_file(root, 3), root / "tmp" / name)
    with opened(root) as store:
        assert holds(store, 3)
        assert store.check().clean
    assert not list((root / "tmp").iterdir())


def test_a_forked_child_is_refused_and_harms_nobody(root):
    with opened(root) as store:
        assert holds(store, 0)  # it is in RAM
        pid = os.fork()
        if pid == 0:
            refused = 0
            for use in (lambda: store.lookup([key_for(0)]), lambda: store.open([key_for(0)]), lambda: opened(root)):
                try:
                    use()
                except StoreError as error:
                    refused += "fork" in str(error)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        assert holds(store, 0)
        assert put(store, 99)
