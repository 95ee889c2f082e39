"""Looking ahead on CUDA: all layers of it in one launch.

The rows are few and see nothing but each other, so that a pass over them is hardly more than reading the weights once:
launching its kernels one by one would take longer. A graph is captured for a number of rows when it is first needed. It
reads what it is about in page-locked memory of the host.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.capture import captured, capturing
from ragkv.kernels.fetch import fetch
from ragkv.lookahead import LayerLoop, Look, look

_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class _Captured:
    """``host`` is what the graph reads, page-locked, ``inputs`` the same on the device; ``read`` is recorded behind
    it."""

    graph: Any
    host: NDArray[np.int64]
    inputs: torch.Tensor
    look: Look
    read: torch.cuda.Event


class FusedLookahead:
    """The twin of :func:`~ragkv.lookahead.look` for up to ``most`` rows."""

    most = _SIZES[-1]

    def __init__(self, runner: LayerLoop) -> None:
        self._runner = runner
        self._captured: dict[int, _Captured] = {}

    def look(self, tokens: NDArray[np.int64]) -> tuple[torch.Tensor, Look]:
        """``tokens``, (2, rows), are ids and positions. They are returned on the device, with what these rows look for:
        both until the next time, which waits for the device to have done this."""
        rows = tokens.shape[1]
        size = _SIZES[bisect_left(_SIZES, rows)]
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        captured.read.synchronize()
        captured.host[:, :rows] = tokens
        captured.graph.replay()
        captured.read.record(torch.cuda.current_stream(self._runner.device))
        found = captured.look
        return captured.inputs[:, :rows], found._replace(queries=found.queries[:, :rows], kv=found.kv[:, :, :rows])

    def _capture(self, size: int) -> _Captured:
        device = self._runner.device
        # Rows behind the last that counts are seen by none before them: they may be anything.
        host = torch.zeros((2, size), dtype=torch.long, pin_memory=True)
        inputs = torch.zeros_like(host, device=device)

        def whole() -> Look:
            fetch(host.view(torch.int32), inputs.view(torch.int32))
            return self._whole(inputs)

        with capturing(device):
            whole()  # what is compiled once must be before
            graph, found = captured(whole)
        read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return _Captured(graph, host.numpy(), inputs, found, read)

    def _whole(self, inputs: torch.Tensor) -> Look:
        steps = look(self._runner, inputs[0], inputs[1])
        while True:
            try:
                next(steps)
            except StopIteration as done:
                found: Look = done.value
                return found
