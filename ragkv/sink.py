"""Where idle conversations go that RAM has no room for: to disk, before they lose their place, and back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import islice, takewhile

from ragkv.archive import Archive
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.places import Places
from ragkv.table import Block, Table

# Blocks written to disk in one go.
KEPT_AT_ONCE = 64


class Sink:
    """Blocks between ``host``, the memory in RAM, and ``archive``, which is closed with it.

    Attributes:
        fetched: blocks that came back whole.
    """

    def __init__(self, archive: Archive, host: PagedKV, places: Places) -> None:
        self._archive, self._host, self._places = archive, host, places
        self._fetches: list[tuple[Future[list[bool]], list[Block]]] = []
        self._keep: tuple[Future[None], list[Block]] | None = None
        self.fetched = 0

    def beginning(self, names: Sequence[bytes]) -> list[bytes]:
        """The first of ``names``, as far as their blocks are on disk alone."""
        return list(takewhile(lambda name: self._places.find(name) is None and name in self._archive, names))

    def fetch(self, table: Table, names: Sequence[bytes]) -> None:
        """Begin to read the blocks of ``names``, all on disk, to the end of ``table``, as far as RAM has room."""
        places = self._places.take_host(len(names))
        if not places:
            return
        names = names[: len(places)]
        move = self._archive.fetch(names, self._host, places)
        blocks = [
            Block(host=place, filled=BLOCK_TOKENS, copied=BLOCK_TOKENS, tables=1, storing=move, kept=True)
            for place in places
        ]
        for block, name in zip(blocks, names, strict=True):
            self._places.name(block, name)
        table.blocks += blocks
        table.names += names
        self._fetches.append((move, blocks))

    def poll(self) -> None:
        """See what came and what is kept, and keep what is next to lose its place in RAM."""
        self._fetches = [pair for pair in self._fetches if not self._has_come(*pair)]
        if self._keep is None or self._keep[0].done():
            self._kept()
            self._keep_idle()

    def wait(self) -> None:
        """Wait for all that is under way."""
        for fetch, _ in self._fetches:
            fetch.exception()
        if self._keep is not None:
            self._keep[0].exception()

    def close(self) -> None:
        self._archive.close()

    def _has_come(self, fetch: Future[list[bool]], blocks: list[Block]) -> bool:
        if not fetch.done():
            return False
        for block, whole in zip(blocks, fetch.result(), strict=True):
            block.storing = None
            self.fetched += whole
            if not whole:
                block.copied = 0
        self._places.settle_all(blocks)
        return True

    def _kept(self) -> None:
        blocks, self._keep = self._keep[1] if self._keep is not None else [], None
        for block in blocks:
            block.keeping, block.kept = False, True

    def _keep_idle(self) -> None:
        places = self._places
        if places.host_free.free >= places.host_free.count // 4:
            return
        going = list(islice((block for block in places.host_idle if not block.kept), KEPT_AT_ONCE))
        named = [(block.name, block.host) for block in going if block.name is not None and block.host is not None]
        if not named:
            return
        for block in going:
            block.keeping = True
        names, hosts = zip(*named, strict=True)
        self._keep = self._archive.keep(names, self._host, hosts), going
