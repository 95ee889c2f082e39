"""What `links` begins before a prompt's KV has memory, and is done with when stored KV begins to arrive."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.echoes import hints, scarcity
from ragkv.lookahead import Look
from ragkv.plan import PromptPlan
from ragkv.runner import ModelRunner
from ragkv.uploading import uploaded

_WORDS = ThreadPoolExecutor(2, thread_name_prefix="ragkv-words")
# Of the prompt, what looks ahead besides the question: where attention goes that finds nothing, and what it is told.
_LEAD = 64


class Prelude:
    """The prompt's words, read by a thread; and what its question looks for, if finding out is a single launch.

    Attributes:
        ids, positions: int64 (rows,), on the device, of the tokens that look ahead.
        found: what they look for, launched; None where :func:`ragkv.lookahead.look` is to be run layer by layer.
    """

    def __init__(self, runner: ModelRunner, plan: PromptPlan) -> None:
        positions = lookahead_positions(plan)
        rows = uploaded(torch.from_numpy(np.stack((plan.array[positions], positions))), runner.device)
        self.ids, self.positions = rows
        fused = runner.lookahead
        self.found: Look | None = fused.look(rows) if fused is not None and len(positions) <= fused.most else None
        self._weights = _WORDS.submit(_weigh, plan)

    def weights(self) -> torch.Tensor:
        """float32 (prompt tokens,), on the host: how much it matters what of each token the question attends to."""
        return self._weights.result()


def _weigh(plan: PromptPlan) -> torch.Tensor:
    return torch.from_numpy(hints(plan) * scarcity(plan))


def lookahead_positions(plan: PromptPlan) -> NDArray[np.int64]:
    """The prompt's first tokens, and the question's."""
    first = plan.spans[0].start if plan.spans else plan.question_start
    return np.concatenate((np.arange(min(_LEAD, first)), np.arange(plan.question_start, len(plan.ids))))
