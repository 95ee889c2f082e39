"""The layer at which `hkvd` should compare values: where the repair it leads to takes most of the deviation away.

Deviations at a later layer tell more of those behind it, but a later layer costs one of all tokens more; so layers are
compared at equal cost. A full prefill and the stored KV of a few prompts say it all; no answer is needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ragkv.methods import CHECK_LAYER


def best_check_layer(deviations: Sequence[torch.Tensor], ratios: Sequence[float]) -> int:
    """The layer that is best on average over prompts and over the costs that ``ratios`` have at layer 1.

    ``deviations``: of each prompt (layers, tokens), see ``Compared.deviations``; where none deviates, it is layer 1.
    """
    told = [each for each in deviations if each.sum() > 0]
    if not told:
        return CHECK_LAYER
    layers = told[0].shape[0]
    budgets = [1 + ratio * (layers - 1) for ratio in ratios]

    def worth(check: int) -> float:
        return statistics.fmean(taken_away(each, check, budget) for each in told for budget in budgets)

    return max(range(1, layers), key=worth, default=CHECK_LAYER)


def taken_away(deviation: torch.Tensor, check: int, budget: float) -> float:
    """The share of ``deviation`` (layers, tokens) that is gone when ``budget`` layers' worth of rows is recomputed: all
    tokens below layer ``check``, and from there on those that deviate most there."""
    layers, tokens = deviation.shape
    dense = min(check, int(budget))
    chosen = round(max(0.0, budget - check) / (layers - check) * tokens)
    gone = deviation[:dense].sum() + deviation[check:, deviation[check].topk(chosen).indices].sum()
    return float(gone / deviation.sum())
