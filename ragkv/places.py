"""Where blocks lie on the device and in RAM, how they are found, and which of them make room.

States of a block on the device: free → in use → (``storing``: being copied to RAM) → idle → free, and ``loading`` on
its way back. One function, :meth:`Places.settle`, decides after every change where a block belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from ragkv.blocks import FreeBlocks
from ragkv.table import Block, Table


class Places:
    """The places of all blocks, by numbers alone.

    Args:
        device, host: how many there are on the device, and in RAM.
        stays: a block that is idle stays on the device although it has a copy.

    Attributes:
        idle: on the device and needed by nobody, the least recently used first.
        host_idle: in RAM, and in no table; the same order.
        leaving: free once the move under way is through.
    """

    def __init__(self, device: int, host: int, *, stays: bool) -> None:
        self.free, self.host_free = FreeBlocks(device), FreeBlocks(host)
        self.idle: dict[Block, None] = {}
        self.host_idle: dict[Block, None] = {}
        self.leaving: set[Block] = set()
        self._named: dict[bytes, Block] = {}
        self._stays = stays

    @property
    def available(self) -> int:
        """Blocks of the device that can be had at once."""
        return self.free.free + len(self.idle)

    def find(self, name: bytes) -> Block | None:
        return self._named.get(name)

    def name(self, block: Block, name: bytes) -> None:
        """Have ``block`` found by its name, unless another with the same content already is."""
        if name not in self._named:
            block.name, self._named[name] = name, block

    def forget(self, block: Block) -> None:
        """Have nobody find it any more. One that is being written to disk keeps its name, and so its place."""
        if block.name is not None and not block.keeping:
            del self._named[block.name]
            block.name = None

    def settle_all(self, blocks: Sequence[Block]) -> None:
        # The last ones are the first to go: what is left is a beginning, which can be gone on from.
        for block in reversed(blocks):
            self.settle(block)

    def settle(self, block: Block) -> None:
        self.idle.pop(block, None)
        self.host_idle.pop(block, None)
        self.leaving.discard(block)
        if block.moving:
            if not block.users and block.device is not None:
                self.leaving.add(block)
        elif block.lost:
            self._forget_if_lost(block)
        elif not block.tables and block.name is None:
            self._release(block)
            self.release_copy(block)
        else:
            self._rest(block)

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """``count`` places on the device, the first behind ``after`` if that can be; None where there are fewer."""
        if count > self.available:
            return None
        while self.free.free < count:
            block = next(iter(self.idle))
            self._release(block)
            self._forget_if_lost(block)
        return self.free.take(count, after)

    def take_host(self, count: int) -> list[int]:
        """Up to ``count`` places in RAM."""
        movable = (block for block in self.host_idle if not block.keeping)
        for block in list(islice(movable, max(0, count - self.host_free.free))):
            self.release_copy(block)
            self._forget_if_lost(block)
        return self.host_free.take(min(count, self.host_free.free)) or []

    def release_copy(self, block: Block) -> None:
        self.host_idle.pop(block, None)
        if block.host is not None:
            self.host_free.give([block.host])
            block.host = None

    def check(self, tables: Iterable[Table]) -> list[str]:
        """What does not fit together, if ``tables`` are all there are and no move is under way."""
        tables = list(tables)
        blocks = {block for table in tables for block in table.blocks} | set(self._named.values())
        faults = self.free.check(b.device for b in blocks if b.device is not None)
        faults += self.host_free.check(b.host for b in blocks if b.host is not None)
        for block in blocks:
            holders = [table for table in tables if block in table.blocks]
            if block.tables != len(holders) or block.users != sum(table.resident for table in holders):
                faults.append(f"{block} stands in {len(holders)} tables")
            if block.name is not None and block.lost:
                faults.append(f"{block} is named and lost")
        if set(self.idle) != {b for b in blocks if not b.users and b.device is not None}:
            faults.append("others are idle than should be")
        if set(self.host_idle) != {b for b in blocks if not b.tables and b.host is not None}:
            faults.append("others are idle in RAM than should be")
        faults += [f"{name.hex()} names another" for name, block in self._named.items() if block.name != name]
        return faults

    def _rest(self, block: Block) -> None:
        """A block that stays: where it waits until somebody needs it, or its place."""
        if not block.users and block.device is not None:
            if block.has_copy and not self._stays:
                self._release(block)
            else:
                self.idle[block] = None
        if not block.tables and block.host is not None:
            self.host_idle[block] = None

    def _release(self, block: Block) -> None:
        self.idle.pop(block, None)
        if block.device is not None:
            self.free.give([block.device])
            block.device = None

    def _forget_if_lost(self, block: Block) -> None:
        if not block.lost:
            return
        self.forget(block)
        if not block.tables:
            self.release_copy(block)
