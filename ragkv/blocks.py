"""Which blocks of a pool are free: contiguous runs that are split when taken and merged when given back.

Blocks that lie side by side move in one copy and are read as one piece, so a request gets the smallest run that holds
it whole, goes on where its last block ends, and is cut up only when nothing else is left (FastSwitch's block groups,
Shen et al. 2024; a buddy system without the powers of two).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ragkv.errors import RagkvError


class FreeBlocks:
    """The free ones of blocks ``0 … count - 1``."""

    def __init__(self, count: int) -> None:
        self.count = self.free = count
        self._taken = bytearray(count)
        self._length: dict[int, int] = {0: count} if count else {}  # of the run that begins there
        self._start: dict[int, int] = {count: 0} if count else {}  # of the run that ends before there

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """``count`` blocks in as few runs as can be had, the first of them behind ``after`` if that is free; None, and
        nothing is taken, where fewer are free."""
        if count > self.free:
            return None
        taken: list[int] = []
        if after is not None and after + 1 in self._length:
            taken += self._cut(after + 1, count)
        while len(taken) < count:
            taken += self._cut(self._choose(count - len(taken)), count - len(taken))
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Take ``blocks`` back.

        Raises:
            RagkvError: one of them was not taken. It would be handed out twice.
        """
        for first, length in runs(sorted(blocks)):
            if first < 0 or self._taken[first : first + length] != b"\1" * length:
                raise RagkvError(f"blocks {first} … {first + length - 1} were given back, and are not all taken")
            self._taken[first : first + length] = bytes(length)
            self._add(first, length)

    def check(self, taken: Iterable[int]) -> list[str]:
        """What is wrong, if exactly ``taken`` should be taken."""
        free = sorted(block for first, length in self._length.items() for block in range(first, first + length))
        faults = [] if len(free) == self.free else [f"{self.free} blocks should be free, runs hold {len(free)}"]
        if sorted([*free, *taken]) != list(range(self.count)):
            faults.append("free and taken blocks are not all blocks, each once")
        if {first + length: first for first, length in self._length.items()} != self._start:
            faults.append("runs do not end where they are said to")
        if any(first + length in self._length for first, length in self._length.items()):
            faults.append("neighbouring runs were not merged")
        return faults

    def _choose(self, count: int) -> int:
        """Start of the smallest run of at least ``count``, or of the largest there is."""
        enough = [(length, first) for first, length in self._length.items() if length >= count]
        return min(enough)[1] if enough else max((length, -first, first) for first, length in self._length.items())[2]

    def _cut(self, first: int, count: int) -> list[int]:
        length = self._length.pop(first)
        count = min(count, length)
        del self._start[first + length]
        if length > count:
            self._length[first + count], self._start[first + length] = length - count, first + count
        self.free -= count
        self._taken[first : first + count] = b"\1" * count
        return list(range(first, first + count))

    def _add(self, first: int, length: int) -> None:
        self.free += length
        end = first + length
        if end in self._length:
            end += self._length.pop(end)
            del self._start[end]
        if first in self._start:
            first = self._start.pop(first)
        self._length[first], self._start[end] = end - first, first


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """``blocks`` as (first, length) of the consecutive stretches in it, in its order."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and sum(found[-1]) == block:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found
