"""Attention of a few query rows over a request's whole KV, with the exact causal limit of every row.

Registered with ``transformers`` under :data:`NAME`; each decoder layer hands the :class:`AttentionStep`
through as its ``attention_mask``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from ragkv.kv import RequestKV

NAME = "ragkv"
CPU_BLOCK_ROWS = 64


class AttentionStep:
    """Which rows are computed in this step and what each may see.

    A query at position ``p`` sees keys at positions ``base … p``, within the layer's sliding window where it
    has one. Masks are built once per window size and shared by all layers.

    Args:
        kv: the request's KV; fresh keys and values are written into it before attention reads it.
        positions: int64 (rows,), ascending, on the KV's device.
        length: keys in use: one more than the last slot any row may see.
        contiguous: the rows are exactly slots ``0 … length - 1`` (a full prefill).
        score_rows: collect, in ``scores``, the attention that these last rows pay to every slot.
    """

    def __init__(
        self, kv: RequestKV, positions: torch.Tensor, length: int, *, contiguous: bool, score_rows: int = 0
    ) -> None:
        self.kv, self.positions, self.length = kv, positions, length
        self.slots = positions - kv.base
        self.contiguous, self.score_rows = contiguous, score_rows
        self.scores: torch.Tensor | None = None
        self._blocks: list[tuple[slice, int]] = []
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def sees_all(self) -> bool:
        """No mask is needed: there is one row, the last, and it sees every key."""
        return self.rows == 1

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``transformers``' cache protocol: (1, kv_heads, rows, head_dim) in, views of all keys out."""
        where = slice(0, self.length) if self.contiguous else self.slots
        self.kv.write(layer_idx, where, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        k, v = self.kv.read(layer_idx, self.length)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def mask(self, window: int | None) -> torch.Tensor:
        """bool (rows, length), True where the row may look."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            keys = torch.arange(self.length, device=self.slots.device)
            allowed = keys <= self.slots[:, None]
            if window is not None:
                allowed &= keys > self.slots[:, None] - window
            self._masks[window] = allowed
        return self._masks[window]

    @property
    def blocks(self) -> list[tuple[slice, int]]:
        """Rows to attend together, and how many keys the last of them may see: the rest is not even looked at.

        Rows ascend, so on a CPU small blocks save about half of a repair's attention. On a GPU each block would be
        one more launch.
        """
        if not self._blocks and self.slots.device.type != "cpu":
            self._blocks = [(slice(0, self.rows), self.length)]  # reading a slot would wait for the device
        elif not self._blocks:
            for start in range(0, self.rows, CPU_BLOCK_ROWS):
                end = min(start + CPU_BLOCK_ROWS, self.rows)
                self._blocks.append((slice(start, end), int(self.slots[end - 1]) + 1))
        return self._blocks

    def collect(self, weights: torch.Tensor) -> None:
        """Add one layer's attention (heads, score_rows, length) of the scored rows."""
        total = weights.sum(dim=(0, 1))
        self.scores = total if self.scores is None else self.scores + total


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, rows, head_dim), key and value (1, kv_heads, length, head_dim) → (1, rows, heads, head_dim)."""
    step = attention_mask
    window = sliding_window if sliding_window is not None and sliding_window < step.length else None
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # Query heads that share a KV head become a batch over it: broadcasting replaces copying the keys.
    q = query.reshape(kv_heads, group, *query.shape[2:])
    k = key.transpose(0, 1).expand(-1, group, -1, -1)
    v = value.transpose(0, 1).expand(-1, group, -1, -1)
    if step.score_rows:
        scored = q[:, :, -step.score_rows :]
        step.collect(_weights(scored, k, step.mask(window)[-step.score_rows :], scaling))
    if step.contiguous and window is None:
        out = sdpa(q, k, v, is_causal=True, scale=scaling)
    elif step.sees_all and window is None:
        out = sdpa(q, k, v, scale=scaling)
    else:
        out = torch.empty_like(q)
        for rows, seen in step.blocks:
            mask = step.mask(window)[rows, :seen]
            out[:, :, rows] = sdpa(q[:, :, rows], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scaling)
    return out.reshape(1, -1, *out.shape[2:]).transpose(1, 2), None


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """float32 (heads, rows, length): what the fused kernels do not give away."""
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    logits = (q @ k.transpose(-1, -2)).float() * scale
    return logits.masked_fill_(~mask, float("-inf")).softmax(dim=-1).flatten(0, 1)


AttentionInterface.register(NAME, attention)
