"""Copies of blocks in RAM: made while others compute, and brought back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from ragkv.paged import PagedKV
from ragkv.places import Places
from ragkv.swap import Mover
from ragkv.table import Block


class Moves:
    """Moves of blocks between ``memory``, the device's, and ``host``.

    Args:
        piecewise: a copy for every block and layer.
        waits: everybody waits for every move.
        stays: a copy is kept when its block is back on the device.
    """

    def __init__(
        self, memory: PagedKV, host: PagedKV, places: Places, *, piecewise: bool, waits: bool, stays: bool
    ) -> None:
        self.out = Mover(memory, host, piecewise=piecewise)
        self.back = Mover(host, memory, piecewise=piecewise)
        self._places, self._waits, self._stays = places, waits, stays
        self._under_way: list[tuple[Future[None], list[Block]]] = []

    def store(self, blocks: Iterable[Block]) -> None:
        """Begin to copy to RAM what has no copy there, as far as there is room."""
        wanted = [block for block in blocks if block.wants_copy]
        homeless = [block for block in wanted if block.host is None]
        for block, host in zip(homeless, self._places.take_host(len(homeless)), strict=False):
            block.host = host
        going = [block for block in wanted if block.host is not None]
        pairs = [(b.device, b.host) for b in going if b.device is not None and b.host is not None]
        if not pairs:
            return
        move = self.out.move(pairs)
        for block in going:
            block.storing, block.copied = move, block.filled
        self._begun(move, going)

    def load(self, blocks: list[Block]) -> None:
        """Begin to copy to the device what is only in RAM. There must be room."""
        if not blocks:
            return
        places = self._places.take(len(blocks)) or []
        pairs = [(b.host, place) for b, place in zip(blocks, places, strict=False) if b.host is not None]
        if len(pairs) < len(blocks):
            raise RuntimeError("blocks that were counted are not there")
        move = self.back.move(pairs)
        for block, place in zip(blocks, places, strict=True):
            block.device, block.loading = place, move
        self._begun(move, blocks)

    def poll(self) -> None:
        """See which are through."""
        begun, self._under_way = self._under_way, []
        for move, blocks in begun:
            if move.done():
                self._through(move, blocks)
            else:
                self._under_way.append((move, blocks))

    def wait(self) -> None:
        """Wait for all."""
        for move, _ in self._under_way:
            move.exception()

    def close(self) -> None:
        """Finish what is under way."""
        self.out.close()
        self.back.close()

    def _begun(self, move: Future[None], blocks: list[Block]) -> None:
        if self._waits:
            self._through(move, blocks)
        else:
            self._under_way.append((move, blocks))

    def _through(self, move: Future[None], blocks: Sequence[Block]) -> None:
        move.result()
        for block in blocks:
            came = block.loading is move
            block.storing = block.loading = None
            if came and not self._stays:
                self._places.release_copy(block)
        self._places.settle_all(blocks)
