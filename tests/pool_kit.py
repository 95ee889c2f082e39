"""A small pool with real memory, and KV that tells whose it is."""

from __future__ import annotations

import torch

from ragkv.archive import Archive
from ragkv.kv import KvShape, RequestKV
from ragkv.lineage import Lineage
from ragkv.pool import KvPool, Table
from ragkv.store import ChunkStore

SHAPE = KvShape(layers=2, kv_heads=1, head_dim=4, dtype=torch.float32)
CPU = torch.device("cpu")
MODES = ["recompute", "blockwise", "groups", "async", "reuse"]


def make_pool(blocks=16, host=16, preemption="reuse"):
    return KvPool(SHAPE, CPU, blocks, host, preemption)


def fill(pool: KvPool, table: Table, ids: list[int]) -> None:
    """Write KV that tells every token's id and position, as a prefill and its decode steps would."""
    kv = RequestKV(SHAPE, len(ids), CPU)
    pool.memory.gather(table.places, kv, table.tokens)
    for layer in range(SHAPE.layers):
        new = slice(table.tokens, len(ids))
        values = torch.tensor(ids[new], dtype=torch.float32)[:, None, None].expand(-1, 1, 4)
        kv.write(layer, new, values + layer, values * 2 + layer)
    pool.place(table, kv, len(ids))
    pool.wrote(table, ids, len(ids))


def assert_holds(pool: KvPool, table: Table, ids: list[int]) -> None:
    kv = RequestKV(SHAPE, len(ids), CPU)
    pool.memory.gather(table.places, kv, len(ids))
    want = torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 1, 4)
    for layer in range(SHAPE.layers):
        k, v = kv.read(layer, len(ids))
        assert torch.equal(k, want + layer)
        assert torch.equal(v, want * 2 + layer)


def started(pool, ids, lineage=None, room=0):
    table = pool.open(ids, lineage or Lineage())
    assert pool.bring(table, len(ids) + room)
    pool.settle()
    fill(pool, table, ids)
    return table


def sound(pool):
    pool.settle()
    assert pool.check() == []


def archived(tmp_path, capacity=2**24):
    store = ChunkStore(tmp_path, capacity_bytes=capacity, policy="lru", ram_bytes=0, threads=1)
    return Archive(store, "model float32")


def sunk(pool, ids, lineage=None):
    """A conversation whose blocks are on disk alone."""
    pool.close(started(pool, ids, lineage))
    for number in range(4):
        pool.settle()
        pool.close(started(pool, [number, *[7] * 110]))
    pool.settle()
    assert not any(pool._places.find(name) for name in (lineage or Lineage()).names(ids, 16))
