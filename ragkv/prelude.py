"""What `links` begins before a prompt's KV has memory: what its question looks for, where that is a single launch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.lookahead import Look
from ragkv.plan import PromptPlan
from ragkv.runner import ModelRunner
from ragkv.uploading import uploaded

# Of the prompt, what looks ahead besides the question: where attention goes that finds nothing, and what it is told.
_LEAD = 64


class Prelude:
    """The rows that look ahead.

    Attributes:
        ids, positions: int64 (rows,), on the device.
        found: what they look for, launched; None where :func:`ragkv.lookahead.look` is to be run layer by layer. What
            reads this, or ids and positions, must be launched before anybody else looks ahead.
    """

    def __init__(self, runner: ModelRunner, plan: PromptPlan) -> None:
        positions = lookahead_positions(plan)
        rows, fused = np.stack((plan.array[positions], positions)), runner.lookahead
        self.found: Look | None = None
        if fused is not None and len(positions) <= fused.most:
            (self.ids, self.positions), self.found = fused.look(rows)
        else:
            self.ids, self.positions = uploaded(torch.from_numpy(rows), runner.device)


def lookahead_positions(plan: PromptPlan) -> NDArray[np.int64]:
    """The prompt's first tokens, and the question's."""
    first = plan.spans[0].start if plan.spans else plan.question_start
    return np.concatenate((np.arange(min(_LEAD, first)), np.arange(plan.question_start, len(plan.ids))))
