"""Blocks on disk: as they were or not at all, and whatever happens to the disk, nobody hears of it but the log."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragkv.archive import Archive
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.store import ChunkStore
from tests.pool_kit import CPU, SHAPE

NAMES = [b"one", b"two", b"three"]


@pytest.fixture
def store(tmp_path):
    store = ChunkStore(tmp_path, capacity_bytes=2**22, policy="lru", ram_bytes=0, threads=1)
    yield store
    store.close()


@pytest.fixture
def archive(store):
    archive = Archive(store, "model float32")
    yield archive
    archive.close()


@pytest.fixture
def memory():
    memory = PagedKV(SHAPE, 8, CPU)
    memory.data.copy_(torch.randn(memory.data.shape, generator=torch.Generator().manual_seed(1)))
    return memory


def test_blocks_come_back_as_they_were_wherever_they_are_put(archive, memory):
    archive.keep(NAMES, memory, [4, 0, 5]).result()
    before = memory.data.clone()
    assert archive.fetch([b"three", b"unknown", b"one"], memory, [1, 2, 3]).result() == [True, False, True]
    assert torch.equal(memory.data[[1, 3]], before[[5, 4]])
    assert torch.equal(memory.data[[0, 2, 4, 5, 6, 7]], before[[0, 2, 4, 5, 6, 7]])


def test_what_is_there_is_known(archive, memory):
    archive.keep(NAMES[:2], memory, [0, 1]).result()
    assert [name in archive for name in NAMES] == [True, True, False]


def test_another_models_blocks_are_not_found(archive, store, memory):
    archive.keep(NAMES, memory, [0, 1, 2]).result()
    other = Archive(store, "model bfloat16")
    assert not any(name in other for name in NAMES)
    assert other.fetch(NAMES, memory, [3, 4, 5]).result() == [False] * 3


def test_nothing_stays_leased(archive, store, memory):
    archive.keep(NAMES, memory, [0, 1, 2]).result()
    archive.fetch(NAMES, memory, [3, 4, 5]).result()
    assert store.clear() == 3


@pytest.mark.parametrize("wrong", ["geometry", "tokens", "codec"])
def test_what_is_no_block_of_this_memory_is_not_read(archive, store, memory, wrong):
    geometry, tokens, codec = SHAPE.geometry, BLOCK_TOKENS, "raw"
    if wrong == "geometry":
        geometry = replace(geometry, layers=1)
    elif wrong == "tokens":
        tokens = 8
    else:
        codec = "int8"
    slabs = memory.data[0].contiguous().view(torch.uint8).flatten(1).numpy()
    slabs = [slab[: len(slab) * tokens // BLOCK_TOKENS] for slab in slabs[: geometry.layers]]
    if codec == "int8":
        kv = memory.data[0].numpy()
        slabs = [(layer[0], layer[1]) for layer in kv]
    store.put(archive._key(b"two"), geometry, slabs, tokens=tokens, model="model float32", codec=codec)
    archive.keep([b"one"], memory, [1]).result()
    assert archive.fetch([b"one", b"two"], memory, [5, 6]).result() == [True, False]
    assert torch.equal(memory.data[5], memory.data[1])


def test_a_full_disk_is_told_once(tmp_path, memory, caplog):
    archive = Archive(ChunkStore(tmp_path, capacity_bytes=4096, policy="lru", ram_bytes=0, threads=1), "model")
    archive.keep(NAMES, memory, [0, 1, 2]).result()
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "not kept on disk" in caplog.text
    assert archive.fetch(NAMES, memory, [3, 4, 5]).result() == [False] * 3
    archive.close()


def test_a_store_that_fails_has_nothing(archive, store, memory):
    archive.keep(NAMES, memory, [0, 1, 2]).result()
    store.close()
    assert NAMES[0] not in archive
    assert archive.fetch(NAMES, memory, [3, 4, 5]).result() == [False] * 3
    archive.keep(NAMES, memory, [0, 1, 2]).result()
