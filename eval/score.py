"""Rows of a quality run: shares with intervals, differences to full prefill, over the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ragkv.eval.asker import Mark, Marks, Setting
from ragkv.eval.cases import Condition
from ragkv.eval.worlds import KINDS

Interval = tuple[float, float]
Row = dict[str, Any]
RESAMPLES = 4000
_Z95 = 1.959964


def wilson(right: int, asked: int) -> Interval:
    """95% interval of a share (Wilson 1927)."""
    share, spread = right / asked, _Z95**2 / asked
    centre = share + spread / 2
    reach = _Z95 * (share * (1 - share) / asked + spread / (4 * asked)) ** 0.5
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # At none and all right the bound is exact, the arithmetic is not.
    return (0.0 if right == 0 else low, 1.0 if right == asked else high)


def paired_interval(differences: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """95% percentile bootstrap of the mean of ``differences``, given world by world.

    Worlds are drawn with replacement, not questions: those of one world share its context. None with fewer
    than two worlds, which say nothing of how worlds differ.
    """
    if len(differences) < 2:
        return None
    sums = np.array([sum(world) for world in differences], dtype=float)
    counts = np.array([len(world) for world in differences])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def rows_of(settings: Sequence[Setting], conditions: Sequence[Condition], cases: Sequence[Marks]) -> list[Row]:
    """One JSON-able row for every condition and setting, given the marks of each world."""
    rows = []
    for condition in conditions:
        full = next(([m[condition, s.work] for m in cases] for s in settings if s.work.method == "full"), None)
        for setting in settings:
            worlds = [marks[condition, setting.work] for marks in cases]
            rows.append(_row(setting, condition, worlds) | _against(worlds, full))
    return rows


def _row(setting: Setting, condition: Condition, worlds: Sequence[Sequence[Mark]]) -> Row:
    marks = [mark for world in worlds for mark in world]
    by_kind = {kind: [mark.right for mark in marks if mark.kind == kind] for kind in KINDS}
    by_kind = {kind: right for kind, right in by_kind.items() if right}
    row = {
        "method": setting.method,
        "ratio": setting.ratio,
        "context_policy": setting.policy,
        "condition": condition,
        "exact_match": statistics.fmean(mark.right for mark in marks),
        "exact_match_interval": wilson(sum(mark.right for mark in marks), len(marks)),
        "by_kind": {kind: statistics.fmean(right) for kind, right in by_kind.items()},
        "questions_by_kind": {kind: len(right) for kind, right in by_kind.items()},
        "recomputed_share": statistics.fmean(mark.share for mark in marks),
        "questions": len(marks),
        "worlds": len(worlds),
        "context_tokens": statistics.fmean(mark.context_tokens for mark in marks),
        "chunks": statistics.fmean(mark.chunks for mark in marks),
    }
    times = [mark.ttft_ms for mark in marks if mark.ttft_ms is not None]
    return row | {"median_ttft_ms": statistics.median(times)} if times else row


def _against(worlds: Sequence[Sequence[Mark]], full: Sequence[Sequence[Mark]] | None) -> dict[str, Any]:
    """How ``worlds`` compare with full prefill, asked the same: nothing where it was not asked."""
    names = ("relative_to_full", "difference_to_full", "difference_interval")
    if full is None:
        return dict.fromkeys(names)
    gains = [[m.right - f.right for m, f in zip(*pair, strict=True)] for pair in zip(worlds, full, strict=True)]
    best = statistics.fmean(mark.right for world in full for mark in world)
    difference = statistics.fmean(gain for world in gains for gain in world)
    relative = (best + difference) / best if best else None
    return dict(zip(names, (relative, difference, paired_interval(gains)), strict=True))
