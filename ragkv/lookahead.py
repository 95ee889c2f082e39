"""What a question will look for, before any of the context is there.

A question's queries at a layer say what it will attend to there, and its own words decide most of that: computed
without the context they rank its tokens as well as with it (docs/blending.md). So they are computed while stored KV is
still on its way, and only the keys of a few layers need to arrive before tokens to repair are selected.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

import torch

from ragkv.attention import AttentionStep
from ragkv.kv import KvShape, RequestKV
from ragkv.methods import searched_layers
from ragkv.rows import Rows


class LayerLoop(Protocol):
    """What of a model runner is needed here."""

    shape: KvShape
    device: torch.device

    def new_kv(self, capacity: int) -> RequestKV: ...
    def rows(self, ids: torch.Tensor, step: AttentionStep) -> Rows: ...
    def run_layer(self, layer: int, rows: Rows) -> None: ...


class Look(NamedTuple):
    """Of some rows that saw nothing but each other, in layers that follow each other: what they look for, and their
    own KV.

    Attributes:
        queries: (layers, rows, heads, head_dim), rotated.
        scales, windows: of each layer's attention.
        kv: (layers, 2, rows, kv_heads, head_dim).
    """

    layers: range
    queries: torch.Tensor
    scales: tuple[float, ...]
    windows: tuple[int | None, ...]
    kv: torch.Tensor

    def behind(self, lead: int) -> Look:
        """Of the rows behind the first ``lead``."""
        return self._replace(queries=self.queries[:, lead:].contiguous(), kv=self.kv[:, :, lead:])


def look(runner: LayerLoop, ids: torch.Tensor, positions: torch.Tensor) -> Generator[None, None, Look]:
    """``ids`` and ``positions`` are int64 (rows,), on the device. Yields between layers."""
    layers = searched_layers(runner.shape.layers)
    kv = runner.new_kv(len(ids))
    slots = torch.arange(len(ids), device=runner.device)
    step = AttentionStep(kv, positions, len(ids), contiguous=True, slots=slots, kept=layers)
    rows = runner.rows(ids, step)
    for layer in range(layers[-1] + 1):
        runner.run_layer(layer, rows)
        yield
    asked, found = range(layers[0], layers[-1] + 1), [step.queries[layer] for layer in layers]
    return Look(
        asked,
        torch.stack([query.rows for query in found]),
        tuple(query.scale for query in found),
        tuple(query.window for query in found),
        kv.slots(0, len(ids))[asked.start : asked.stop],
    )
