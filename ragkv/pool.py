"""The KV of all conversations: tables of blocks that they share, and what becomes of them between turns.

A block is free, in use, or idle. Idle ones stay where they are until somebody needs the room: the KV of a preempted or
finished conversation that comes back in time is simply still there. What a block holds never changes once it is full,
so a copy of it in RAM stays good for ever and is made once: as soon as it is full (``reuse``), and a preempted request
only moves what was written since. What comes back later comes from wherever that is sooner: RAM, disk, or a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ragkv.archive import Archive
from ragkv.kv import KvShape, RequestKV
from ragkv.lineage import ALL, Lineage
from ragkv.move_costs import MoveCosts
from ragkv.moves import Moves
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.places import Places
from ragkv.sink import Sink
from ragkv.table import Block, Table, blocks_for

__all__ = ["KvPool", "Preemption", "Table", "blocks_for"]

Preemption = Literal["recompute", "blockwise", "groups", "async", "reuse"]
# Taken at once when a request outgrows its blocks, where there is plenty: what lies together moves together.
GROWTH = 8


class KvPool:
    """The KV of all conversations. One thread uses it.

    Args:
        blocks: on the device.
        host_blocks: in RAM.
        preemption: how a table that is parked gives up its blocks; see docs/scheduling.md.
        archive: where blocks go that RAM has no room for; closed with the pool.

    Attributes:
        memory: where the blocks of the device lie.
        moves: between the device and RAM.
        costs: what is moved, and what computed again; only ``reuse`` asks.
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
        self._swaps, self._reuses = preemption != "recompute", preemption == "reuse"
        archive = archive if self._reuses else None
        self.memory = PagedKV(shape, blocks, device)
        host = PagedKV(shape, host_blocks if self._swaps else 0, torch.device("cpu"), pinned=device.type == "cuda")
        self._places = Places(blocks, host.blocks, stays=self._reuses)
        self.moves = Moves(
            self.memory,
            host,
            self._places,
            piecewise=preemption == "blockwise",
            waits=preemption in ("blockwise", "groups"),
            stays=self._reuses,
        )
        self._sink = Sink(archive, host, self._places) if archive is not None else None
        self.costs = MoveCosts(self.moves.out.lane, self.moves.back.lane, archive.reading if archive else None)
        self._tables: set[Table] = set()
        self.hit_tokens = 0

    # What the scheduler counts with.

    @property
    def available(self) -> int:
        """Blocks that can be had at once."""
        return self._places.available

    @property
    def freeing(self) -> int:
        """Blocks that can be had as soon as their copy is made."""
        return len(self._places.leaving)

    @staticmethod
    def exclusive(table: Table) -> int:
        """Blocks that parking ``table`` would give back."""
        return sum(block.users == 1 for block in table.blocks)

    def stats(self) -> dict[str, float]:
        """Numbers by name; what :attr:`MoveCosts.counts` counts among them."""
        places, block = self._places, self.memory.block_bytes
        return {
            "pool_blocks": places.free.count,
            "pool_free_blocks": places.free.free,
            "pool_idle_blocks": len(places.idle),
            "host_blocks": places.host_free.count,
            "host_free_blocks": places.host_free.free,
            "prefix_hit_tokens": self.hit_tokens,
            "swap_out_bytes": self.moves.out.lane.blocks * block,
            "swap_in_bytes": self.moves.back.lane.blocks * block,
            "fetched_blocks": self._sink.fetched if self._sink is not None else 0,
            **{f"{name}_blocks": count for name, count in self.costs.counts.items()},
        }

    # A conversation's life.

    def open(self, ids: Sequence[int], lineage: Lineage) -> Table:
        """A table with the longest beginning of ``ids`` whose KV is somewhere; the last token's is not looked for."""
        table, names = Table(lineage), lineage.names(ids[:-1], BLOCK_TOKENS)
        self._find(table, names)
        self._fetch(table, names, len(ids))
        self._find(table, names)  # what follows in memory is not read a second time
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
        kept_idle = sum(block in self._places.idle for block in table.blocks)
        if needed > self.available - kept_idle:
            return False
        self.costs.counts.update(kept=len(table.blocks) - len(away), loaded=len(away))
        for block in table.blocks:
            block.users += 1
            self._places.settle(block)
        self.moves.load(away)
        table.resident = True
        return self.grow(table, tokens)

    def grow(self, table: Table, tokens: int) -> bool:
        """Room for ``tokens`` tokens in a resident table; False where there is none, and nothing is done."""
        missing = blocks_for(tokens) - len(table.blocks)
        if missing <= 0:
            return True
        last = table.blocks[-1].device if table.blocks else None
        places = self._places.take(max(missing, min(GROWTH, self._places.free.free // 8)), last)
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
            self._places.name(block, name)
        if self._reuses:
            self.moves.store(fresh)

    def survey(self, table: Table) -> int:
        """How many tokens of a table that is not resident are still there, from its first on, and sooner brought than
        computed again; forgets the others."""
        kept = next((i for i, block in enumerate(table.blocks) if block.lost), len(table.blocks))
        if kept < len(table.blocks):
            self.cut(table, kept * BLOCK_TOKENS)
        if self._reuses and table.exact:
            self._cut_what_is_sooner_computed(table)
        return table.tokens

    def cut(self, table: Table, tokens: int) -> None:
        """Forget what a table that is not resident has behind its first ``tokens`` tokens, a multiple of a block's."""
        table.tokens = tokens
        self._drop_unwritten(table)
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
        self._drop_unwritten(table)
        if self._swaps:
            self.moves.store(self._to_copy(table))
        self._places.settle_all(table.blocks)

    def close(self, table: Table, *, askable: int = ALL) -> None:
        """The conversation is over, or waits for its next turn: named blocks stay until the room is needed, as far as
        anybody can ask for their tokens, the first ``askable``."""
        if table.closed:
            return
        table.closed = True
        for block in table.blocks[askable // BLOCK_TOKENS :]:
            self._places.forget(block)
        self._tables.discard(table)
        for block in table.blocks:
            block.tables -= 1
            block.users -= table.resident
        table.resident = False
        self._places.settle_all(table.blocks)

    def poll(self) -> None:
        """See which moves are through."""
        self.moves.poll()
        if self._sink is not None:
            self._sink.poll()

    def settle(self) -> None:
        """Wait for all moves."""
        self.moves.wait()
        if self._sink is not None:
            self._sink.wait()
        self.poll()

    def shut(self) -> None:
        """Finish what is under way; the pool is not used afterwards."""
        self.moves.close()
        if self._sink is not None:
            self._sink.close()

    def check(self) -> list[str]:
        """What does not fit together; for tests, and when idle. Call it with no move under way."""
        return self._places.check(self._tables)

    def _find(self, table: Table, names: Sequence[bytes]) -> None:
        for name in names[len(table.blocks) :]:
            block = self._places.find(name)
            if block is None:
                break
            table.blocks.append(block)
            table.names.append(name)
            block.tables += 1
            self._places.settle(block)

    def _drop_unwritten(self, table: Table) -> None:
        written = blocks_for(table.tokens)
        dropped = table.blocks[written:]
        del table.blocks[written:]
        for block in dropped:
            block.tables -= 1
        self._places.settle_all(dropped)

    # Moved or computed again. What was blended is always moved: computed again, it might be another's approximation.

    def _fetch(self, table: Table, names: Sequence[bytes], tokens: int) -> None:
        """Begin to read what follows the table's blocks from disk; ``tokens`` is the prompt's length."""
        if self._sink is None or not (wanted := self._sink.beginning(names[len(table.blocks) :])):
            return
        if tokens <= table.lineage.exact:
            wanted = wanted[: self.costs.fetching(len(wanted), tokens - len(table.blocks) * BLOCK_TOKENS)]
        self._sink.fetch(table, wanted)

    def _cut_what_is_sooner_computed(self, table: Table) -> None:
        away = [i for i, block in enumerate(table.blocks) if block.device is None]
        if not away:
            return
        worth = self.costs.loading(len(away), table.tokens - away[0] * BLOCK_TOKENS)
        if worth < len(away):
            self.costs.counts["recomputed"] += len(table.blocks) - away[worth]
            self.cut(table, away[worth] * BLOCK_TOKENS)

    def _to_copy(self, table: Table) -> list[Block]:
        """What of a table that is parked is to be in RAM when it comes back."""
        wanting = [(i, block) for i, block in enumerate(table.blocks) if not block.users and block.wants_copy]
        blocks = [block for _, block in wanting]
        if not blocks or not self._reuses or not table.exact:
            return blocks
        return blocks[: self.costs.storing(len(blocks), table.tokens - wanting[0][0] * BLOCK_TOKENS)]
