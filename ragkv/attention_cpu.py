"""Attention of scattered rows on a CPU: matrix products over blocks of rows, each with the keys its rows may see.

``torch``'s fused kernel for CPUs keeps a third of the speed of plain products, and a mask costs it a pass over every
logit. Here whole blocks are products, and only the columns that some row of a block may see and another may not
are masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Logits of a block are written, normalised and read again: 8 MB of them in half precision stay in the cache.
_BLOCK_LOGITS = 1 << 22
_MIN_ROWS, _MAX_ROWS = 16, 64
_SAMPLED_KEYS = 64


class Block(NamedTuple):
    """Rows attended together.

    Attributes:
        rows: which.
        keys: those that at least one of the rows may see.
        common: those that all of them may see; may be empty.
        hidden: ranges of keys, counted from the first of ``keys``, and where in them bool (rows, keys) a row may not
            look.
    """

    rows: slice
    keys: slice
    common: slice
    hidden: list[tuple[slice, torch.Tensor]]

    @property
    def logits(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start)


def blocks_of(mask: torch.Tensor, heads: int) -> list[Block]:
    """Blocks of a ``mask`` (rows, length) in which every row sees a run of keys that neither begins nor ends before
    the run of the row above it."""
    rows, length = mask.shape
    size = min(max(_BLOCK_LOGITS // (heads * length), _MIN_ROWS), _MAX_ROWS)
    slices = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    edges = mask[[row for part in slices for row in (part.start, part.stop - 1)]]
    begins = edges.byte().argmax(dim=1)
    ends = begins + edges.sum(dim=1)
    runs = torch.stack((begins, ends), dim=1).view(-1, 4).tolist()
    return [_block(mask, part, *run) for part, run in zip(slices, runs, strict=True)]


def _block(mask: torch.Tensor, rows: slice, first: int, first_end: int, last: int, last_end: int) -> Block:
    """The first of ``rows`` sees ``first … first_end - 1``, the last of them ``last … last_end - 1``."""
    parts = [(first, last), (first_end, last_end)] if last < first_end else [(first, last_end)]
    hidden = [(slice(a - first, b - first), ~mask[rows, a:b]) for a, b in parts if a < b]
    return Block(rows, slice(first, last_end), slice(last, max(last, first_end)), hidden)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block], scale: float, score_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q (kv_heads, group, rows, head_dim), k and v (kv_heads, length, head_dim) → (rows, kv_heads, group, head_dim).

    Also, where asked for, float32 (length,): the attention that the last ``score_rows`` rows pay to every key, summed
    over rows and heads.
    """
    kv_heads, group, rows, _ = q.shape
    out = q.new_empty(rows, kv_heads, group, v.shape[-1])
    work = q.new_empty(kv_heads * group * max(block.logits for block in blocks))
    scores = torch.zeros(k.shape[1]) if score_rows else None
    for block in blocks:
        weights = _weights(q[:, :, block.rows], k, block, scale, work)
        mixed = weights.flatten(1, 2) @ v[:, block.keys]
        out[block.rows] = mixed.view(kv_heads, group, -1, v.shape[-1]).permute(2, 0, 1, 3)
        if scores is not None and (scored := block.rows.stop - max(block.rows.start, rows - score_rows)) > 0:
            scores[block.keys] += weights[:, :, -scored:].sum(dim=(0, 1, 2), dtype=torch.float32)
    return out, scores


def _weights(q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, work: torch.Tensor) -> torch.Tensor:
    """Attention weights (kv_heads, group, rows, keys) of a block, in ``work``."""
    packed = q.flatten(1, 2)
    keys = k[:, block.keys].transpose(1, 2)
    shape = (*packed.shape[:2], keys.shape[2])
    logits = work[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.baddbmm(_less(packed, k[:, block.common], scale), packed, keys, alpha=scale, out=logits)
    by_row = logits.view(*q.shape[:3], -1)
    for where, hidden in block.hidden:
        by_row[..., where].masked_fill_(hidden, float("-inf"))
    return torch.softmax(by_row, dim=-1, out=by_row)


def _less(packed: torch.Tensor, common: torch.Tensor, scale: float) -> torch.Tensor:
    """(kv_heads, packed rows, 1): minus the largest logit of each row among a few of the ``common`` keys.

    A product rounds what it writes, and bfloat16 is coarse far from zero. With a number near the row's maximum taken
    off before that rounding, the logits that matter are small; softmax is blind to it.
    """
    if not common.shape[1]:
        return packed.new_zeros((*packed.shape[:2], 1))
    sampled = common[:, :: max(1, common.shape[1] // _SAMPLED_KEYS)]
    return (packed @ sampled.transpose(1, 2)).amax(dim=-1, keepdim=True).mul_(-scale)
