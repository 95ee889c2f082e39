"""One token for each of several requests, their KV in blocks of a pool: the plain twin of the paged kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ragkv.blocks import runs
from ragkv.paged import BLOCK_TOKENS, PagedKV


@dataclass
class Lane:
    """A place in the batch. ``position``: of the token whose KV the next step writes; ``blocks``: where KV lies."""

    position: int
    blocks: list[int] = field(default_factory=list)


class PagedStep:
    """What ``transformers``' layers take for cache and mask: each row is written to, and attends over, its own blocks.

    A row at position ``p`` sees positions ``0 … p``, within the layer's sliding window where it has one: these keys are
    cut out of its blocks, so there is no mask.

    Args:
        lanes: of the rows; each has a block for its position.
    """

    def __init__(self, pool: PagedKV, lanes: Sequence[Lane]) -> None:
        self._pool, self._lanes = pool, lanes
        device = pool.data.device
        at = [(lane.blocks[lane.position // BLOCK_TOKENS], lane.position % BLOCK_TOKENS) for lane in lanes]
        self._blocks, self._offsets = torch.tensor(at, device=device).T
        self._layer = 0
        self._stretches = cache(self._find_stretches)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``transformers``' cache protocol: (1, kv_heads, rows, head_dim) in. Attention, next, asks the pool."""
        self._layer = layer_idx
        for part, rows in enumerate((keys, values)):
            self._pool.data[self._blocks, layer_idx, part, self._offsets] = rows[0].transpose(0, 1)
        return keys, values

    def attend(self, query: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """query (1, heads, rows, head_dim) → (1, rows, heads, head_dim)."""
        heads, rows, width = query.shape[1:]
        # The query heads that share a KV head, as rows over it: a key is read once for all of them.
        q = query[0].view(self._pool.shape.kv_heads, -1, rows, width).permute(2, 0, 1, 3)
        out = query.new_empty((1, rows, heads, width))
        for row in range(rows):
            keys, values = self._read(row, window)
            out[0, row] = sdpa(q[row][None], keys[None], values[None], scale=scale).reshape(heads, width)
        return out

    def _read(self, row: int, window: int | None) -> torch.Tensor:
        """(2, kv_heads, keys, head_dim): what the row sees, a view where its blocks lie side by side."""
        first, end, stretches = self._stretches(row, window)
        parts = [self._pool.keys_and_values(self._layer, *stretch) for stretch in stretches]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))[:, :, first:end]

    def _find_stretches(self, row: int, window: int | None) -> tuple[int, int, list[tuple[int, int]]]:
        """Consecutive blocks that hold what the row sees, and from where to where in them."""
        lane = self._lanes[row]
        position = lane.position
        first = 0 if window is None else max(0, position + 1 - window)
        skipped = first // BLOCK_TOKENS
        seen = lane.blocks[skipped : position // BLOCK_TOKENS + 1]
        shift = skipped * BLOCK_TOKENS
        return first - shift, position + 1 - shift, runs(seen)
