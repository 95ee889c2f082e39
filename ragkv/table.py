"""A conversation's block table, and the blocks that stand in it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ragkv.lineage import Lineage
from ragkv.paged import BLOCK_TOKENS


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
    def moving(self) -> bool:
        return self.storing is not None or self.loading is not None

    @property
    def has_copy(self) -> bool:
        """All that is written is in RAM, or on its way there."""
        return self.host is not None and self.copied >= self.filled

    @property
    def wants_copy(self) -> bool:
        """Something is written that RAM does not have, and nobody is about to bring it there."""
        return self.device is not None and self.filled > 0 and not self.has_copy and not self.moving

    @property
    def lost(self) -> bool:
        """Its KV is nowhere any more."""
        return self.device is None and not self.has_copy and not self.moving


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

    @property
    def exact(self) -> bool:
        """Its KV is what a full prefill computes, all of it."""
        return self.tokens <= self.lineage.exact
