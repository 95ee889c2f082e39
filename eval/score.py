"""Rows of a quality run: figures with intervals, differences to full prefill, over the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ragkv.eval import metrics
from ragkv.eval.agreement import same_answer, token_agreement
from ragkv.eval.asker import Mark, Marks, Setting
from ragkv.eval.cases import Condition
from ragkv.eval.worlds import KINDS

Interval = tuple[float, float]
Row = dict[str, Any]
Judge = Callable[[Mark], float]
# For each world, in its questions' order; None where a question has no accepted answer.
Values = list[list[float | None]]
RESAMPLES = 4000
AGREEMENT = ("token_agreement", "answer_match")
_YES_OR_NO = ("exact_match", "answer_match")
_Z95 = 1.959964


def _first_line(mark: Mark) -> str:
    """The answer proper: models without a chat template go on to the next question of their own making."""
    return mark.answer.split("\n", 1)[0]


JUDGES: Mapping[str, Judge] = {
    "exact_match": lambda mark: metrics.exact_match(_first_line(mark), mark.golds),
    "f1": lambda mark: metrics.f1(_first_line(mark), mark.golds),
    "rouge_l": lambda mark: metrics.rouge_l(mark.answer, mark.golds),
}
# Answers of worlds are single words and numbers, and the model was taught their very form.
WORLD_JUDGES: Mapping[str, Judge] = {"exact_match": lambda mark: float(mark.answer in mark.golds)}


def wilson(right: float, asked: int) -> Interval:
    """95% interval of a share (Wilson 1927)."""
    share, spread = right / asked, _Z95**2 / asked
    centre = share + spread / 2
    reach = _Z95 * (share * (1 - share) / asked + spread / (4 * asked)) ** 0.5
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # At none and all right the bound is exact, the arithmetic is not.
    return (0.0 if right == 0 else low, 1.0 if right == asked else high)


def paired_interval(values: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """95% percentile bootstrap of the mean of ``values`` (differences, where they are paired), given world by world.

    Worlds are drawn with replacement, not questions: those of one world share its context. None with fewer
    than two worlds, which say nothing of how worlds differ.
    """
    values = [world for world in values if world]
    if len(values) < 2:
        return None
    sums = np.array([sum(world) for world in values], dtype=float)
    counts = np.array([len(world) for world in values])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def rows_of(
    settings: Sequence[Setting],
    conditions: Sequence[Condition],
    cases: Sequence[Marks],
    *,
    metric: str = "exact_match",
    judges: Mapping[str, Judge] = WORLD_JUDGES,
) -> list[Row]:
    """One JSON-able row for every condition and setting, given the marks of each world.

    Every row has each judge's figure and the agreement with full prefill, None where there is nothing to compare
    with; ``metric`` names the one that kinds and the difference to full prefill are of.
    """
    rows = []
    for condition in conditions:
        full = next(([m[condition, s.work] for m in cases] for s in settings if s.work.method == "full"), None)
        best = _judged(full, full, judges)[metric] if full else None
        for setting in settings:
            worlds = [marks[condition, setting.work] for marks in cases]
            values = _judged(worlds, full, judges)
            row = _facts(setting, condition, worlds) | _figures(values, metric)
            row |= {"questions_scored": len(_known(values[metric]))}
            row |= _by_kind(worlds, values[metric]) | _against(values[metric], best)
            rows.append(row)
    return rows


def _judged(
    worlds: Sequence[Sequence[Mark]], full: Sequence[Sequence[Mark]] | None, judges: Mapping[str, Judge]
) -> dict[str, Values]:
    """What every figure is the mean of."""
    values: dict[str, Values] = {
        name: [[judge(mark) if mark.golds else None for mark in world] for world in worlds]
        for name, judge in judges.items()
    }
    if full is None:
        return values | {name: [[None] * len(world) for world in worlds] for name in AGREEMENT}
    pairs = [list(zip(*pair, strict=True)) for pair in zip(worlds, full, strict=True)]
    values["token_agreement"] = [[token_agreement(other.tokens, mark.tokens) for mark, other in w] for w in pairs]
    values["answer_match"] = [[float(same_answer(mark.answer, other.answer)) for mark, other in w] for w in pairs]
    return values


def _facts(setting: Setting, condition: Condition, worlds: Sequence[Sequence[Mark]]) -> Row:
    marks = [mark for world in worlds for mark in world]
    row = {
        "method": setting.method,
        "ratio": setting.ratio,
        "context_policy": setting.policy,
        "condition": condition,
        "recomputed_share": statistics.fmean(mark.share for mark in marks),
        "questions": len(marks),
        "questions_cut": sum(mark.cut for mark in marks),
        "worlds": len(worlds),
        "context_tokens": statistics.fmean(mark.context_tokens for mark in marks),
        "chunks": statistics.fmean(mark.chunks for mark in marks),
    }
    times = [mark.ttft_ms for mark in marks if mark.ttft_ms is not None]
    return row | {"median_ttft_ms": statistics.median(times)} if times else row


def _figures(values: Mapping[str, Values], metric: str) -> Row:
    """Each figure and its interval, ``score`` once more the one that ``metric`` names."""
    row: Row = {"metric": metric}
    for name, worlds in values.items():
        row[name] = _mean(worlds)
        row[f"{name}_interval"] = _interval(name, worlds)
    return row | {"score": row[metric], "score_interval": row[f"{metric}_interval"]}


def _mean(worlds: Values) -> float | None:
    known = _known(worlds)
    return statistics.fmean(known) if known else None


def _interval(name: str, worlds: Values) -> Interval | None:
    known = _known(worlds)
    if name in _YES_OR_NO:
        return wilson(round(sum(known)), len(known)) if known else None
    return paired_interval([[value for value in world if value is not None] for world in worlds])


def _known(worlds: Values) -> list[float]:
    return [value for world in worlds for value in world if value is not None]


def _by_kind(worlds: Sequence[Sequence[Mark]], values: Values) -> Row:
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for marks, judged in zip(worlds, values, strict=True):
        for mark, value in zip(marks, judged, strict=True):
            if mark.kind and value is not None:
                by_kind.setdefault(mark.kind, []).append(value)
    return {
        "by_kind": {kind: statistics.fmean(own) for kind, own in by_kind.items() if own},
        "questions_by_kind": {kind: len(own) for kind, own in by_kind.items() if own},
    }


def _against(worlds: Values, full: Values | None) -> Row:
    """How ``worlds`` compare with full prefill, asked the same: nothing where it was not asked."""
    names = ("relative_to_full", "difference_to_full", "difference_interval")
    best = _mean(full) if full else None
    if full is None or best is None:
        return dict.fromkeys(names)
    gains = [
        [value - other for value, other in zip(*pair, strict=True) if value is not None and other is not None]
        for pair in zip(worlds, full, strict=True)
    ]
    difference = statistics.fmean(gain for world in gains for gain in world)
    relative = (best + difference) / best if best else None
    return dict(zip(names, (relative, difference, paired_interval(gains)), strict=True))
