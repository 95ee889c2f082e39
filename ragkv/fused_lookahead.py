"""Looking ahead on CUDA: all layers of it in one launch.

The rows are few and see nothing but each other, so that a pass over them is hardly more than reading the weights once:
launching its kernels one by one would take longer. A graph is captured for a number of rows when it is first needed.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch

from ragkv.capture import captured, capturing
from ragkv.lookahead import LayerLoop, Look, look

_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class _Captured:
    """``rows``: the queries of all layers, (layers, rows, heads, head_dim)."""

    graph: Any
    inputs: torch.Tensor
    look: Look
    rows: torch.Tensor


class FusedLookahead:
    """The twin of :func:`~ragkv.lookahead.look` for up to ``most`` rows."""

    most = _SIZES[-1]

    def __init__(self, runner: LayerLoop) -> None:
        self._runner = runner
        self._captured: dict[int, _Captured] = {}

    def look(self, tokens: torch.Tensor) -> Look:
        """``tokens``, int64 (2, rows), are ids and positions. The result stays when the next one is computed."""
        rows = tokens.shape[1]
        size = _SIZES[bisect_left(_SIZES, rows)]
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        captured.inputs[:, :rows] = tokens
        captured.graph.replay()
        queries = captured.look.queries
        found = zip(queries.items(), captured.rows[:, :rows].clone(), strict=True)
        return Look({at: one._replace(rows=own) for (at, one), own in found}, captured.look.kv[:, :, :rows].clone())

    def _capture(self, size: int) -> _Captured:
        device = self._runner.device
        # Rows behind the last that counts are seen by none before them: they may be anything.
        inputs = torch.zeros((2, size), dtype=torch.long, device=device)
        with capturing(device):
            self._whole(inputs)  # what is compiled once must be before
            graph, (found, stacked) = captured(lambda: _stacked(self._whole(inputs)))
        return _Captured(graph, inputs, found, stacked)

    def _whole(self, inputs: torch.Tensor) -> Look:
        steps = look(self._runner, inputs[0], inputs[1])
        while True:
            try:
                next(steps)
            except StopIteration as done:
                found: Look = done.value
                return found


def _stacked(found: Look) -> tuple[Look, torch.Tensor]:
    return found, torch.stack([query.rows for query in found.queries.values()])
