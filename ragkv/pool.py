"""Whose KV lies in which block: tables of conversations, blocks they share, copies in RAM, and what makes room.

A block is free, in use, or idle. Idle ones stay where they are until somebody needs the room: the KV of a preempted or
finished conversation that comes back in time is simply still there. What a block holds never changes once it is full,
so a copy of it in RAM stays good for ever and is made once: as soon as it is full (``reuse``), and a preempted request
only moves what was written since.

States of a block on the device: free → in use → (``storing``: being copied to RAM) → idle → free, and ``loading`` on
its way back. One function, :meth:`KvPool._settle`, decides after every change where a block belongs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, Literal

import torch

from ragkv.archive import Archive
from ragkv.blocks import FreeBlocks
from ragkv.kv import KvShape, RequestKV
from ragkv.lineage import Lineage
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.swap import Mover

Preemption = Literal["recompute", "blockwise", "groups", "async", "reuse"]
# Taken at once when a request outgrows its blocks, where there is plenty: what lies together moves together.
GROWTH = 8
# Blocks written to disk in one go.
KEPT_AT_ONCE = 64


def blocks_for(tokens: int) -> int:
    """Blocks that hold the KV of ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(eq=False, slots=True)
class Block:
    """KV of up to 16 consecutive tokens of a conversation, all layers.

    Attributes:
        name: of its content once it is full and may be found by others.
        device, host: where it lies in the pool and in RAM.
        filled: its tokens that are written; ``copied``: those of them that the copy in RAM has.
        tables: it stands in; ``users``: those of them that need it on the device.
        storing, loading: the move under way, to RAM (from the device, or from disk) and to the device.
        keeping: being written to disk; ``kept``: it was, as far as the disk took it.
    """

    name: bytes | None = None
    device: int | None = None
    host: int | None = None
    filled: int = 0
    copied: int = 0
    tables: int = 0
    users: int = 0
    storing: Future[Any] | None = None
    loading: Future[None] | None = None
    keeping: bool = False
    kept: bool = False

    @property
    def has_copy(self) -> bool:
        return self.host is not None and self.storing is None and self.copied >= self.filled

    @property
    def lost(self) -> bool:
        """Its KV is nowhere any more."""
        return self.device is None and not self.has_copy and self.storing is None and self.loading is None


@dataclass(eq=False)
class Table:
    """The blocks of one conversation, in order; ``tokens`` of them are written.

    ``resident``: all are on the device, or on their way there, and stay.
    """

    lineage: Lineage
    blocks: list[Block] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    tokens: int = 0
    resident: bool = False
    closed: bool = False

    @property
    def places(self) -> list[int]:
        """Where its blocks lie on the device."""
        return [block.device for block in self.blocks if block.device is not None]

    @property
    def in_memory(self) -> bool:
        """Nothing of it is still being read from disk."""
        return all(block.device is not None or block.storing is None for block in self.blocks)

    @property
    def arrived(self) -> bool:
        """Nothing of it is still being loaded."""
        return all(block.loading is None for block in self.blocks)


class KvPool:
    """The KV of all conversations. One thread uses it.

    Args:
        blocks: on the device.
        host_blocks: in RAM.
        preemption: how a table that is parked gives up its blocks; see docs/scheduling.md.
        archive: where blocks go that RAM has no room for; closed with the pool.
    """

    def __init__(
        self,
        shape: KvShape,
        device: torch.device,
        blocks: int,
        host_blocks: int,
        preemption: Preemption = "reuse",
        archive: Archive | None = None,
    ) -> None:
        self.memory = PagedKV(shape, blocks, device)
        self._swaps = preemption != "recompute"
        self._waits = preemption in ("blockwise", "groups")
        self._reuses = preemption == "reuse"
        self._host = PagedKV(
            shape, host_blocks if self._swaps else 0, torch.device("cpu"), pinned=device.type == "cuda"
        )
        piecewise = preemption == "blockwise"
        self.out = Mover(self.memory, self._host, piecewise=piecewise)
        self.back = Mover(self._host, self.memory, piecewise=piecewise)
        self._free, self._host_free = FreeBlocks(blocks), FreeBlocks(self._host.blocks)
        self._named: dict[bytes, Block] = {}
        self._tables: set[Table] = set()
        # The least recently used first. What is idle in RAM belongs to no table.
        self._idle: dict[Block, None] = {}
        self._host_idle: OrderedDict[Block, None] = OrderedDict()
        self._leaving: set[Block] = set()
        self._moves: list[tuple[Future[None], list[Block]]] = []
        self._archive = archive if self._reuses else None
        self._fetches: list[tuple[Future[list[bool]], list[Block]]] = []
        self._keep: tuple[Future[None], list[Block]] | None = None
        self.fetched = 0
        self.hit_tokens = 0

    # What the scheduler counts with.

    @property
    def available(self) -> int:
        """Blocks that can be had at once."""
        return self._free.free + len(self._idle)

    @property
    def freeing(self) -> int:
        """Blocks that can be had as soon as their copy is made."""
        return len(self._leaving)

    @staticmethod
    def exclusive(table: Table) -> int:
        """Blocks that parking ``table`` would give back."""
        return sum(block.users == 1 for block in table.blocks)

    def stats(self) -> dict[str, float]:
        return {
            "pool_blocks": self._free.count,
            "pool_free_blocks": self._free.free,
            "pool_idle_blocks": len(self._idle),
            "host_blocks": self._host_free.count,
            "host_free_blocks": self._host_free.free,
            "prefix_hit_tokens": self.hit_tokens,
            "swap_out_bytes": self.out.blocks * self.memory.block_bytes,
            "fetched_blocks": self.fetched,
            "swap_in_bytes": self.back.blocks * self.memory.block_bytes,
        }

    # A conversation's life.

    def open(self, ids: Sequence[int], lineage: Lineage) -> Table:
        """A table with the longest beginning of ``ids`` whose KV is somewhere; the last token's is not looked for."""
        table, names = Table(lineage), lineage.names(ids[:-1], BLOCK_TOKENS)
        for name in names:
            block = self._named.get(name)
            if block is None or block.lost:
                break
            table.blocks.append(block)
            table.names.append(name)
            block.tables += 1
            self._settle(block)
        if self._archive is not None:
            self._fetch(table, names[len(table.blocks) :], self._archive)
        table.tokens = len(table.blocks) * BLOCK_TOKENS
        self.hit_tokens += table.tokens
        self._tables.add(table)
        return table

    def bring(self, table: Table, tokens: int) -> bool:
        """Have the table on the device, with room for ``tokens`` tokens. Where there is none: False, nothing is done.

        Nothing of it may be lost (:meth:`survey`), and all of it is in memory (:attr:`Table.in_memory`). Blocks that
        were in RAM arrive later (:attr:`Table.arrived`).
        """
        away = [block for block in table.blocks if block.device is None]
        needed = len(away) + max(0, blocks_for(tokens) - len(table.blocks))
        kept_idle = sum(block in self._idle for block in table.blocks)
        if needed > self.available - kept_idle:
            return False
        for block in table.blocks:
            block.users += 1
            self._settle(block)
        self._load(away)
        table.resident = True
        return self.grow(table, tokens)

    def grow(self, table: Table, tokens: int) -> bool:
        """Room for ``tokens`` tokens in a resident table; False where there is none, and nothing is done."""
        missing = blocks_for(tokens) - len(table.blocks)
        if missing <= 0:
            return True
        last = table.blocks[-1].device if table.blocks else None
        places = self._take(max(missing, min(GROWTH, self._free.free // 8)), last)
        if places is None:
            return False
        table.blocks += [Block(device=place, tables=1, users=1) for place in places]
        return True

    def wrote(self, table: Table, ids: Sequence[int], tokens: int) -> None:
        """``tokens`` tokens of ``table`` are written, ``ids`` are those known of them."""
        first, table.tokens = table.tokens // BLOCK_TOKENS, max(tokens, table.tokens)
        for index in range(first, blocks_for(table.tokens)):
            table.blocks[index].filled = min(BLOCK_TOKENS, table.tokens - index * BLOCK_TOKENS)
        named = len(table.names)
        whole = min(len(ids), table.tokens) // BLOCK_TOKENS
        if whole <= named:
            return
        table.names = table.lineage.names(ids[: whole * BLOCK_TOKENS], BLOCK_TOKENS, table.names)
        fresh = table.blocks[named:whole]
        for block, name in zip(fresh, table.names[named:], strict=True):
            if name not in self._named:
                block.name, self._named[name] = name, block
        if self._reuses:
            self._store(fresh)

    def survey(self, table: Table) -> int:
        """How many tokens of a table that is not resident are still there, from its first on; forgets the others."""
        kept = next((i for i, block in enumerate(table.blocks) if block.lost), len(table.blocks))
        if kept < len(table.blocks):
            self.cut(table, kept * BLOCK_TOKENS)
        return table.tokens

    def cut(self, table: Table, tokens: int) -> None:
        """Forget what a table that is not resident has behind its first ``tokens`` tokens, a multiple of a block's."""
        table.tokens = tokens
        self._cut(table, tokens)
        del table.names[len(table.blocks) :]

    def place(self, table: Table, kv: RequestKV, tokens: int) -> None:
        """Copy what a prefill computed behind what the table had, up to ``tokens`` tokens, from its workspace."""
        first = table.tokens // BLOCK_TOKENS
        done = first * BLOCK_TOKENS
        self.memory.scatter(kv, table.places[first : blocks_for(tokens)], done, tokens - done)

    def park(self, table: Table) -> None:
        """Let others have the room: what the table holds is copied to RAM, or may be lost, as the mode has it."""
        table.resident = False
        for block in table.blocks:
            block.users -= 1
        self._cut(table, table.tokens)
        if self._swaps:
            self._store([block for block in table.blocks if not block.users])
        self._settle_all(table.blocks)

    def close(self, table: Table) -> None:
        """The conversation is over, or waits for its next turn: named blocks stay until the room is needed."""
        if table.closed:
            return
        table.closed = True
        self._tables.discard(table)
        for block in table.blocks:
            block.tables -= 1
            block.users -= table.resident
        table.resident = False
        self._settle_all(table.blocks)

    def poll(self) -> None:
        """See which moves are through."""
        pending = []
        for move, blocks in self._moves:
            if move.done():
                self._moved(move, blocks)
            else:
                pending.append((move, blocks))
        self._moves = pending
        self._fetches = [pair for pair in self._fetches if not self._has_come(*pair)]
        if self._archive is not None:
            self._keep_idle(self._archive)

    def settle(self) -> None:
        """Wait for all moves."""
        for move, _ in self._moves:
            move.exception()
        for fetch, _ in self._fetches:
            fetch.exception()
        if self._keep is not None:
            self._keep[0].exception()
        self.poll()

    def shut(self) -> None:
        """Finish what is under way; the pool is not used afterwards."""
        self.out.close()
        self.back.close()
        if self._archive is not None:
            self._archive.close()

    def check(self) -> list[str]:
        """What does not fit together; for tests, and when idle. Call it with no move under way."""
        tables = list(self._tables)
        blocks = {block for table in tables for block in table.blocks} | set(self._named.values())
        faults = self._free.check(b.device for b in blocks if b.device is not None)
        faults += self._host_free.check(b.host for b in blocks if b.host is not None)
        for block in blocks:
            holders = [table for table in tables if block in table.blocks]
            if block.tables != len(holders) or block.users != sum(table.resident for table in holders):
                faults.append(f"{block} stands in {len(holders)} tables")
            if (block in self._idle) != (not block.users and block.device is not None):
                faults.append(f"{block} should not be idle, or should")
            if (block in self._host_idle) != (not block.tables and block.host is not None):
                faults.append(f"{block} should not be idle in RAM, or should")
            if block.name is not None and block.lost:
                faults.append(f"{block} is named and lost")
        faults += [f"{name.hex()} names another" for name, block in self._named.items() if block.name != name]
        return faults

    # Where blocks belong.

    def _settle_all(self, blocks: Iterable[Block]) -> None:
        # The last ones are the first to go: what is left is a beginning, which can be gone on from.
        for block in reversed(list(blocks)):
            self._settle(block)

    def _settle(self, block: Block) -> None:
        self._idle.pop(block, None)
        self._host_idle.pop(block, None)
        self._leaving.discard(block)
        if block.storing is not None or block.loading is not None:
            if not block.users and block.device is not None:
                self._leaving.add(block)
            return
        if not block.tables and block.name is None and not block.keeping:
            self._release(block)
            self._release_copy(block)
            return
        if not block.users and block.device is not None:
            if block.tables and block.has_copy and not self._reuses:
                self._release(block)
            else:
                self._idle[block] = None
        if not block.tables and block.host is not None and not block.keeping:
            self._host_idle[block] = None
        if block.lost:
            self._forget(block)

    def _release(self, block: Block) -> None:
        if block.device is not None:
            self._free.give([block.device])
            block.device = None

    def _release_copy(self, block: Block) -> None:
        if block.host is not None:
            self._host_free.give([block.host])
            block.host, block.copied, block.kept = None, 0, False

    def _forget(self, block: Block) -> None:
        if block.name is not None:
            del self._named[block.name]
            block.name = None
        if not block.tables:
            self._release_copy(block)

    def _cut(self, table: Table, tokens: int) -> None:
        dropped = table.blocks[blocks_for(tokens) :]
        del table.blocks[blocks_for(tokens) :]
        for block in dropped:
            block.tables -= 1
        self._settle_all(dropped)

    def _take(self, count: int, after: int | None = None) -> list[int] | None:
        if count > self.available:
            return None
        while self._free.free < count:
            block = next(iter(self._idle))
            del self._idle[block]
            self._release(block)
            if block.lost:
                self._forget(block)
        return self._free.take(count, after)

    def _take_host(self, count: int) -> list[int]:
        """Up to ``count`` blocks in RAM."""
        while self._host_free.free < count and self._host_idle:
            block = next(iter(self._host_idle))
            del self._host_idle[block]
            self._release_copy(block)
            if block.lost:
                self._forget(block)
        return self._host_free.take(min(count, self._host_free.free)) or []

    # Moves.

    def _store(self, blocks: Iterable[Block]) -> None:
        """Begin to copy to RAM what has no copy there, as far as there is room."""
        wanted = [
            block
            for block in blocks
            if block.device is not None and block.filled and not (block.has_copy or block.storing or block.loading)
        ]
        homeless = [block for block in wanted if block.host is None]
        for block, host in zip(homeless, self._take_host(len(homeless)), strict=False):
            block.host = host
        going = [block for block in wanted if block.host is not None]
        if not going:
            return
        move = self.out.move([(block.device, block.host) for block in going])  # type: ignore[misc]
        for block in going:
            block.storing, block.copied = move, block.filled
        self._under_way(move, going)

    def _load(self, blocks: list[Block]) -> None:
        """Begin to copy to the device what is only in RAM."""
        if not blocks:
            return
        places = self._take(len(blocks))
        if places is None:
            raise RuntimeError("blocks that were counted are not there")
        for block, place in zip(blocks, places, strict=True):
            block.device = place
        move = self.back.move([(block.host, block.device) for block in blocks])  # type: ignore[misc]
        for block in blocks:
            block.loading = move
        self._under_way(move, blocks)

    def _under_way(self, move: Future[None], blocks: list[Block]) -> None:
        if self._waits:
            move.exception()
            self._moved(move, blocks)
            return
        self._moves.append((move, blocks))
        for block in blocks:
            self._settle(block)

    def _moved(self, move: Future[None], blocks: Sequence[Block]) -> None:
        move.result()
        for block in blocks:
            came = block.loading is move
            block.storing = block.loading = None
            if came and not self._reuses:
                self._release_copy(block)
        self._settle_all(blocks)

    # Disk.

    def _fetch(self, table: Table, names: Sequence[bytes], archive: Archive) -> None:
        """Begin to read the blocks of ``names``, as far as they are there and RAM has room."""
        wanted = list(takewhile(archive.__contains__, names))
        places = self._take_host(len(wanted))
        if not places:
            return
        wanted = wanted[: len(places)]
        move = archive.fetch(wanted, self._host, places)
        blocks = [
            Block(name, host=place, filled=BLOCK_TOKENS, copied=BLOCK_TOKENS, tables=1, storing=move, kept=True)
            for name, place in zip(wanted, places, strict=True)
        ]
        self._named.update(zip(wanted, blocks, strict=True))
        table.blocks += blocks
        table.names += wanted
        self._fetches.append((move, blocks))

    def _has_come(self, fetch: Future[list[bool]], blocks: list[Block]) -> bool:
        if not fetch.done():
            return False
        for block, whole in zip(blocks, fetch.result(), strict=True):
            block.storing = None
            self.fetched += whole
            if not whole:
                block.copied = 0
        self._settle_all(blocks)
        return True

    def _keep_idle(self, archive: Archive) -> None:
        """Write the blocks that are next to lose their place in RAM, before they do."""
        if self._keep is not None:
            if not self._keep[0].done():
                return
            blocks, self._keep = self._keep[1], None
            for block in reversed(blocks):
                block.keeping, block.kept = False, True
                self._settle(block)
                if block in self._host_idle:
                    self._host_idle.move_to_end(block, last=False)
        if self._host_free.free >= self._host_free.count // 4:
            return
        going = list(islice((block for block in self._host_idle if not block.kept), KEPT_AT_ONCE))
        named = [(block.name, block.host) for block in going if block.name is not None and block.host is not None]
        if not named:
            return
        for block in going:
            block.keeping = True
            del self._host_idle[block]
        names, places = zip(*named, strict=True)
        self._keep = archive.keep(names, self._host, places), going
