"""Memory of a pool of KV blocks. Which block belongs to whom is known elsewhere; here is only where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ragkv.blocks import runs
from ragkv.kv import KvShape, RequestKV
from ragkv.pinned import PageLocking

BLOCK_TOKENS = 16


def block_bytes(shape: KvShape) -> int:
    """Of one block."""
    return 2 * shape.layers * BLOCK_TOKENS * shape.kv_heads * shape.head_dim * shape.dtype.itemsize


class PagedKV:
    """``blocks`` blocks of :data:`BLOCK_TOKENS` tokens each, all layers.

    On a device that swaps, and in the host memory it swaps with, all layers of a block are adjacent, so that blocks
    that lie side by side move in one copy. Where a CPU computes, a layer's keys of consecutive blocks are, for each
    head, one matrix that attention reads where it lies.

    Attributes:
        data: (blocks, layers, 2, BLOCK_TOKENS, kv_heads, head_dim): keys, then values. Its strides differ, see above.
        block_bytes: of one block.
        with_spare: the same, and behind it, unless it is ``pinned``, a block (number ``spare``) that belongs to nobody:
            where a row that stands for no request is written.

    Args:
        pinned: in page-locked host memory (``device`` is the CPU), in the layout of a device.
    """

    def __init__(self, shape: KvShape, blocks: int, device: torch.device, *, pinned: bool = False) -> None:
        self.shape, self.blocks = shape, blocks
        layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim
        self.block_bytes = block_bytes(shape)
        self.spare = blocks
        if pinned:
            memory = _page_locked(blocks * self.block_bytes).view(shape.dtype)
            self.with_spare = memory.view(blocks, layers, 2, heads, BLOCK_TOKENS, width).transpose(3, 4)
        elif device.type == "cpu":
            memory = torch.empty((layers, 2, heads, blocks + 1, BLOCK_TOKENS, width), dtype=shape.dtype)
            self.with_spare = memory.permute(3, 0, 1, 4, 2, 5)
        else:
            size = (blocks + 1, layers, 2, heads, BLOCK_TOKENS, width)
            self.with_spare = torch.empty(size, dtype=shape.dtype, device=device).transpose(3, 4)
        self.data = self.with_spare[:blocks]

    def keys_and_values(self, layer: int, first: int, count: int) -> torch.Tensor:
        """(2, kv_heads, count · BLOCK_TOKENS, head_dim) of consecutive blocks; where a CPU computes, a view."""
        blocks = self.data[first : first + count, layer]
        return blocks.permute(1, 3, 0, 2, 4).reshape(2, self.shape.kv_heads, -1, self.shape.head_dim)

    def scatter(self, kv: RequestKV, blocks: Sequence[int], first: int, tokens: int) -> None:
        """Copy slots ``first … first + tokens - 1`` of ``kv`` into ``blocks``, from the start of the first of them."""
        for here, there in self._pairs(kv, blocks, first, tokens):
            _wide(here).copy_(_wide(there))

    def gather(self, blocks: Sequence[int], kv: RequestKV, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of ``blocks`` into the first slots of ``kv``."""
        for here, there in self._pairs(kv, blocks, 0, tokens):
            _wide(there).copy_(_wide(here))

    def _pairs(
        self, kv: RequestKV, blocks: Sequence[int], first: int, tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the same tokens, (blocks, layers, 2, tokens, kv_heads, head_dim): in the pool, and in ``kv``."""
        slots = kv.slots(first, first + tokens)
        whole, rest = divmod(tokens, BLOCK_TOKENS)
        done = 0
        for start, count in runs(blocks[:whole]):
            part = slots[:, :, done * BLOCK_TOKENS : (done + count) * BLOCK_TOKENS]
            yield self.data[start : start + count], torch.unflatten(part, 2, (count, BLOCK_TOKENS)).movedim(2, 0)
            done += count
        if rest:
            yield self.data[blocks[whole], :, :, :rest][None], slots[:, :, whole * BLOCK_TOKENS :][None]


def _wide(data: torch.Tensor) -> torch.Tensor:
    """Seen as numbers of 16 bytes, where its rows are whole ones: a device copies these three times as fast."""
    return data.view(torch.complex128) if data.shape[-1] * data.itemsize % 16 == 0 else data


def _page_locked(nbytes: int) -> torch.Tensor:
    """On a thread of its own: a refusal would fail the next launch of the thread that asked."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as thread:
        memory = thread.submit(PageLocking(torch.device("cuda")), nbytes).result()
    return torch.from_numpy(memory)
