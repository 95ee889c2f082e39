"""Attention on a CPU: blocks of rows, each over the keys its rows may see.

In bfloat16, ``torch``'s fused kernel for CPUs reaches a third of the speed of plain products, and a mask costs it
another pass over every logit. So blocks are products here, and only those columns are masked that some rows of a block
may see and others may not. In float32 the fused kernel is as fast as products are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

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
    def mask(self) -> torch.Tensor:
        """bool (rows, keys), True where the row may look."""
        allowed = torch.ones(self.rows.stop - self.rows.start, self.keys.stop - self.keys.start, dtype=torch.bool)
        for where, hidden in self.hidden:
            allowed[:, where] = ~hidden
        return allowed

    @property
    def logits(self) -> int:
        return int((self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start))


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


def causal_blocks(length: int, heads: int) -> list[Block]:
    """Blocks of ``length`` rows of which each sees itself and all rows above it: no mask of that size is made."""
    size = min(max(_BLOCK_LOGITS // (heads * length), _MIN_ROWS), _MAX_ROWS)
    later = torch.ones(size, size, dtype=torch.bool).triu(1)
    return [_causal_block(slice(start, min(start + size, length)), later) for start in range(0, length, size)]


def _causal_block(rows: slice, later: torch.Tensor) -> Block:
    count = rows.stop - rows.start
    return Block(rows, slice(0, rows.stop), slice(0, rows.start + 1), [(rows, later[:count, :count])])


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
    if q.dtype == torch.float16:  # several times slower on a CPU than float32
        out, scores = attend(q.float(), k.float(), v.float(), blocks, scale, score_rows)
        return out.half(), scores
    if q.dtype == torch.float32 and not score_rows:
        return _attend_fused(q, k, v, blocks, scale), None
    kv_heads, group, rows, _ = q.shape
    out = _out(q, v)
    work = q.new_empty(kv_heads * group * max(block.logits for block in blocks))
    scores = torch.zeros(k.shape[1]) if score_rows else None
    for block in blocks:
        weights = _weights(q[:, :, block.rows], k, block, scale, work)
        mixed = weights.flatten(1, 2) @ v[:, block.keys]
        out[block.rows] = mixed.view(kv_heads, group, -1, v.shape[-1]).permute(2, 0, 1, 3)
        if scores is not None and (scored := block.rows.stop - max(block.rows.start, rows - score_rows)) > 0:
            scores[block.keys] += weights[:, :, -scored:].sum(dim=(0, 1, 2), dtype=torch.float32)
    return out, scores


def _out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[2], *q.shape[:2], v.shape[-1])


def _attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block], scale: float) -> torch.Tensor:
    out = _out(q, v)
    group = q.shape[1]
    for block in blocks:
        # Query heads that share a KV head become a batch over it: broadcasting replaces copying the keys.
        keys, values = (part[:, None, block.keys].expand(-1, group, -1, -1) for part in (k, v))
        mixed = sdpa(q[:, :, block.rows], keys, values, attn_mask=block.mask, scale=scale)
        out[block.rows] = mixed.permute(2, 0, 1, 3)
    return out


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
