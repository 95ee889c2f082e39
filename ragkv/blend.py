"""Blending: start answering from stored chunk KV, repaired by recomputing a few tokens (CacheBlend, EuroSys'25).

One pass over the layers. Rows that must be computed (prefix, chunks without stored KV, question) and rows a
strategy selected for repair go through every layer together; before layer *i* runs, the stored KV of layer *i*
is placed, and the store already reads the layers after it.

The loop is a generator that yields the layers it wants run (:mod:`ragkv.steps`), so that whoever drives it can run
them for others along with it, and serve others in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.attention import AttentionStep
from ragkv.clock import Stopwatch
from ragkv.kernels.twins import weigh
from ragkv.kv import RequestKV
from ragkv.loading import LayerLoader
from ragkv.plan import PromptPlan, Span
from ragkv.prelude import Prelude
from ragkv.rows import Rows
from ragkv.runner import ModelRunner
from ragkv.steps import LayerCall, Steps
from ragkv.uploading import uploaded


@dataclass(frozen=True)
class Start:
    """What a strategy hands to the main pass: ``rows``, ready for layer ``layer``.

    ``dense_layers``: layers it ran over all context tokens on the way.
    """

    rows: Rows
    layer: int
    dense_layers: int = 0


Strategy = Callable[["Blend"], Steps[Start]]


def repair_budget(reused: Iterable[Span], ratio: float) -> int:
    """How many tokens of ``reused`` chunks a strategy with this ``ratio`` may select."""
    return round(ratio * sum(span.length for span in reused if span.context_present))


class Blend:
    """One blended prefill.

    Attributes:
        least: how many tokens are computed anyway.

    Args:
        reused: spans whose stored KV the loader brings; the other spans are computed.
        strategy: chooses the tokens to repair; see :mod:`ragkv.selection`.
        known: leading tokens whose KV is there already; no reused span begins before their end.
        ratio: share of the repairable context tokens a strategy selects.
        prelude: what the strategy wants begun early, if it was.
        seed: of the ``random`` strategy.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: PromptPlan,
        kv: RequestKV,
        loader: LayerLoader,
        reused: list[Span],
        *,
        strategy: Strategy,
        ratio: float,
        watch: Stopwatch,
        known: int = 0,
        prelude: Prelude | None = None,
        seed: int = 0,
    ) -> None:
        self.runner, self.plan, self.kv, self.loader, self.prelude = runner, plan, kv, loader, prelude
        self.reused, self.ratio, self.seed, self.watch, self.known = reused, ratio, seed, watch, known
        self._strategy = strategy
        self.length = len(plan.ids)
        required, repairable = np.ones(self.length, np.bool_), np.zeros(self.length, np.bool_)
        required[:known] = False
        for span in reused:
            required[span.start : span.end] = False
            # Recomputing tokens whose document context is not in this prompt would forget what it knew.
            repairable[span.start : span.end] = span.context_present
        self.required, self.repairable = torch.from_numpy(required), torch.from_numpy(repairable)
        self.least = int(required.sum())
        self.dense_layers = 0

    @cached_property
    def required_places(self) -> torch.Tensor:
        """int64, on the device: the positions that are computed anyway."""
        return self.places(self.required)

    @property
    def budget(self) -> int:
        """How many tokens the strategy may select."""
        return repair_budget(self.reused, self.ratio)

    def steps(self) -> Steps[Rows]:
        """Returns the rows after the last layer, the prompt's last token last: all that was computed in all layers but
        the dense ones.

        Raises:
            ChunkLostError: a stored chunk turned out unreadable; start again without it.
        """
        start = yield from self._strategy(self)
        self.dense_layers = start.dense_layers
        yield from self.advance(start.rows, start.layer, self.runner.shape.layers, "recompute")
        return start.rows

    def places(self, where: torch.Tensor) -> torch.Tensor:
        """The positions, on the device, where ``where``, bool (length,) on the host, holds."""
        return uploaded(where.nonzero()[:, 0], self.runner.device)

    def rows(
        self, positions: torch.Tensor, hidden: torch.Tensor | None = None, *, score_question: bool = False
    ) -> Rows:
        """Rows for ``positions`` (rows,), ascending, on the device: embedded, or with ``hidden`` states."""
        contiguous = len(positions) == self.length
        step = AttentionStep(
            self.kv,
            positions,
            self.length,
            contiguous=contiguous,
            score_rows=self.length - self.plan.question_start if score_question else 0,
            last_only=True,
        )
        if hidden is not None:
            return self.runner.rows_from(hidden, step, self.length)
        return self.runner.rows_of(self.plan.array, step, self.length)

    def advance(self, rows: Rows, first: int, end: int, part: str) -> Steps[None]:
        """Have layers ``first … end - 1`` run, each as soon as its stored KV is placed."""
        for layer in range(first, end):
            self.watch.lap(part)
            self.loader.ensure(layer)
            self.watch.lap("load")
            yield LayerCall(layer, rows, self.watch, part)
            self.watch.lap("queue")

    def take(self, scores: torch.Tensor, weights: NDArray[np.float32] | None = None) -> torch.Tensor:
        """The required positions and the ``budget`` repairable ones with the highest ``scores`` (length,), times
        ``weights``, finite and at least 0, if any; ascending, on the device.

        Scores that are on the device stay there, and nobody waits for them.
        """
        device = self.runner.device
        scales = np.ones(self.length, np.float32) if weights is None else weights.astype(np.float32)
        np.copyto(scales, -1, where=~self.repairable.numpy())
        np.copyto(scales, np.inf, where=self.required.numpy())
        given, fused = torch.from_numpy(scales), self.runner.fused
        if fused is not None and scores.device == device:
            weighed = fused.weigh(scores, given)
        else:
            weighed = weigh(scores, uploaded(given, scores.device))
        best = weighed.topk(self.least + self.budget, sorted=False).indices.sort().values
        return best if best.device == device else uploaded(best, device)
