"""Attention of a few query rows over a request's whole KV, with the exact causal limit of every row.

Registered with ``transformers`` under :data:`NAME`; each decoder layer hands the :class:`AttentionStep`
through as its ``attention_mask``. Rows of different requests come with a :class:`JoinedStep` while they are prefilled,
and with a :class:`~ragkv.paged_step.PagedStep` while they are decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from ragkv import attention_cpu
from ragkv.kv import RequestKV
from ragkv.paged_step import PagedStep

NAME = "ragkv"
_SCORED_LOGITS = 1 << 24


class Query(NamedTuple):
    """What some rows look for at a layer: ``rows`` (rows, heads, head_dim), rotated."""

    rows: torch.Tensor
    scale: float
    window: int | None


class AttentionStep:
    """Which rows are computed in this step and what each may see.

    A query at position ``p`` sees keys at positions ``base … p``, within the layer's sliding window where it
    has one. Masks are built once per window size and shared by all layers.

    Attributes:
        causal: rows see what is said above. A step of other rules has a :meth:`mask` of its own, which the loops
            that know no masks leave to the plain one.

    Args:
        kv: the request's KV; fresh keys and values are written into it before attention reads it.
        positions: int64 (rows,), ascending, on the KV's device.
        length: keys in use: one more than the last slot any row may see.
        contiguous: the rows are exactly slots ``0 … length - 1`` (a full prefill).
        score_rows: collect, in ``scores``, the attention that these last rows pay to every slot.
        slots: where the rows stand in the KV, ascending, if not at their positions.
        kept: layers whose queries are kept, in ``queries``.
        last_only: behind the last layer nobody asks for more than the last row.
    """

    causal = True

    def __init__(
        self,
        kv: RequestKV,
        positions: torch.Tensor,
        length: int,
        *,
        contiguous: bool,
        score_rows: int = 0,
        slots: torch.Tensor | None = None,
        kept: Collection[int] = (),
        last_only: bool = False,
    ) -> None:
        self.kv, self.positions, self.length = kv, positions, length
        self.slots = kv.slot(positions) if slots is None else slots
        self.contiguous, self.score_rows = contiguous, score_rows
        self.scores: torch.Tensor | None = None
        self.kept, self.queries, self.last_only = kept, dict[int, Query](), last_only
        self._blocks: dict[int | None, list[attention_cpu.Block]] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def steps(self) -> tuple[AttentionStep, ...]:
        return (self,)

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

    def blocks(self, window: int | None, heads: int) -> list[attention_cpu.Block]:
        """The mask as :mod:`ragkv.attention_cpu` takes it."""
        if window not in self._blocks:
            causal = self.contiguous and window is None
            self._blocks[window] = (
                attention_cpu.causal_blocks(self.length, heads)
                if causal
                else attention_cpu.blocks_of(self.mask(window), heads)
            )
        return self._blocks[window]

    def collect(self, scores: torch.Tensor) -> None:
        """Add one layer's attention (length,) of the scored rows."""
        self.scores = scores if self.scores is None else self.scores + scores

    def score(self, layer: int, query: Query) -> None:
        """Collect the attention that ``query``, of all rows, pays at ``layer``."""
        k = self.kv.read(layer, self.length)[0].transpose(0, 1)[:, None]  # (kv_heads, 1, length, head_dim)
        heads = query.rows.transpose(0, 1)
        q = heads.reshape(k.shape[0], -1, *heads.shape[1:])  # (kv_heads, group, rows, head_dim)
        rows = max(1, _SCORED_LOGITS // (query.rows.shape[1] * self.length))
        masks = torch.split(self.mask(query.window), rows)
        for some, mask in zip(torch.split(q, rows, dim=2), masks, strict=True):
            self.collect(_weights(some, k, mask, query.scale).sum(dim=(0, 1, 2)))


class JoinedStep:
    """Steps of several requests, whose rows go through a layer as one: each writes into its own KV, and looks at it.

    Attributes:
        steps: in the order of their rows.
    """

    def __init__(self, steps: Sequence[AttentionStep]) -> None:
        self.steps = tuple(steps)
        self.positions = torch.cat([step.positions for step in steps])
        self.causal = all(step.causal for step in steps)
        self._rows = [step.rows for step in steps]
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`AttentionStep.update`, but the keys that each looks at are kept for :meth:`attend`."""
        parts = zip(
            self.steps, torch.split(keys, self._rows, dim=2), torch.split(values, self._rows, dim=2), strict=True
        )
        self._seen = [step.update(k, v, layer_idx) for step, k, v in parts]
        return keys, values

    def attend(self, module: torch.nn.Module, query: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """query (1, heads, rows, head_dim) → (1, rows, heads, head_dim)."""
        each = zip(self.steps, torch.split(query, self._rows, dim=2), self._seen, strict=True)
        rows = [attention(module, q, k, v, step, scale, window)[0] for step, q, (k, v) in each]
        self._seen = []
        return torch.cat(rows, dim=1)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionStep | JoinedStep | PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, rows, head_dim), key and value (1, kv_heads, length, head_dim) → (1, rows, heads, head_dim)."""
    step = attention_mask
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(step, PagedStep):
        return step.attend(query, scale, sliding_window), None
    if isinstance(step, JoinedStep):
        return step.attend(module, query, scale, sliding_window), None
    if step.kept and (layer := cast(int, module.layer_idx)) in step.kept:
        step.queries[layer] = Query(query[0].transpose(0, 1), scale, sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < step.length else None
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    q = query.reshape(kv_heads, group, *query.shape[2:])
    fused = window is None and (step.contiguous or step.sees_all)
    if query.device.type == "cpu" and step.causal and not (fused and _is_fast(step, query.dtype)):
        blocks = step.blocks(window, query.shape[1])
        rows, scores = attention_cpu.attend(q, key[0], value[0], blocks, scale, step.score_rows)
        if scores is not None:
            step.collect(scores)
        return rows.flatten(1, 2)[None], None
    # Query heads that share a KV head become a batch over it: broadcasting replaces copying the keys.
    k = key.transpose(0, 1).expand(-1, group, -1, -1)
    v = value.transpose(0, 1).expand(-1, group, -1, -1)
    if query.device.type == "cuda" and not step.sees_all:
        # torch 2.11's memory-efficient kernel answers wrongly from 65 rows on if its keys are broadcast.
        k, v = k.contiguous(), v.contiguous()
    if step.score_rows:
        mask = step.mask(window)[-step.score_rows :]
        step.collect(_weights(q[:, :, -step.score_rows :], k, mask, scale).sum(dim=(0, 1, 2)))
    if fused:
        out = sdpa(q, k, v, is_causal=step.contiguous, scale=scale)
    else:
        out = sdpa(q, k, v, attn_mask=step.mask(window), scale=scale)
    return out.reshape(1, -1, *out.shape[2:]).transpose(1, 2), None


def _is_fast(step: AttentionStep, dtype: torch.dtype) -> bool:
    """Whether the fused kernel, needing no mask, is the better one on a CPU."""
    return not step.score_rows and (step.sees_all or dtype != torch.bfloat16)


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 (kv_heads, group, rows, length): what the fused kernels do not give away."""
    logits = (q @ k.transpose(-1, -2)).float() * scale
    return logits.masked_fill_(~mask, float("-inf")).softmax(dim=-1)


AttentionInterface.register(NAME, attention)
