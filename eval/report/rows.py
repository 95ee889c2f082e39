"""Rows of result files, checked and typed: what every figure of a report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ragkv.eval.palette import METRIC_NAMES
from ragkv.eval.quality_rows import with_score
from ragkv.eval.serving_measures import PERCENTILES

Interval = tuple[float, float]
Setting = tuple[str, float]
_SPEED = {"method", "ratio", "tier", "codec", "ttft_ms", "full_prefill_ms"}
_SERVING = {"load", "policy", "preemption", "p99_ttft_ms", "throughput_tok_s"}
FIGURES = (
    "requests_s",
    "goodput",
    "jain",
    "service_gap",
    "unfinished",
    "refused",
    "failed",
    "steps",
    "step_ms",
    "scheduler_ms",
    "scheduler_share",
    "idle_share",
    "preemptions",
    "preemption_rate",
    "swap_out_bytes",
    "swap_in_bytes",
    "prefix_hit_share",
)
_QUALITY = {"method", "ratio", "exact_match", "recomputed_share", "context_policy"}


class Place(NamedTuple):
    """Where and on what a speed was measured."""

    model: str
    device: str
    context_tokens: int
    batch: int
    tier: str
    codec: str


class Panel(NamedTuple):
    """What a quality was measured on. Rows of two runs belong together only where all of it is the same."""

    model: str
    suite: str
    policy: str
    condition: str
    metric: str
    questions: int
    contexts: int
    tokens: int


@dataclass(frozen=True)
class Speed:
    """A row of ``ragkv eval ttft``; times in ms."""

    place: Place
    setting: Setting
    share: float | None
    ttft: float
    full: float
    floor: float | None = None
    floor_by: str = ""
    loaded: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    spread: Interval | None = None

    @property
    def speedup(self) -> float:
        return self.full / self.ttft


@dataclass(frozen=True)
class Quality:
    """A row of ``ragkv eval quality``; shares from 0 to 1, and their 95% intervals."""

    panel: Panel
    codec: str
    setting: Setting
    share: float
    score: float
    interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    by_kind: Mapping[str, float]
    questions_by_kind: Mapping[str, int]
    figures: Mapping[str, float]
    ttft: float | None


class Run(NamedTuple):
    """Which load, on what, ordered how. Only runs that agree in all of it are held against each other."""

    model: str
    device: str
    load: str
    policy: str
    rate: float
    requests: int
    pool_tokens: int
    at_once: int | None


class TenantTimes(NamedTuple):
    """What one tenant saw; its service is computed tokens, those of output twice."""

    times: Mapping[str, float]
    requests: int
    service: float


@dataclass(frozen=True)
class Serving:
    """A row of ``ragkv eval serving``; times in ms. ``curves`` are times at the quantiles of all rows, ``figures`` all
    other numbers by the names that they have in the file."""

    run: Run
    preemption: str
    times: Mapping[str, float]
    curves: Mapping[str, tuple[float, ...]]
    throughput: float
    figures: Mapping[str, float]
    tenants: Mapping[str, TenantTimes]


def is_serving(row: Mapping[str, Any]) -> bool:
    return row.keys() >= _SERVING


def serving(row: Mapping[str, Any], facts: Mapping[str, Any]) -> Serving:
    """``facts`` are the file's, for rows that do not name model or device. Raises ValueError that names the field."""
    read = _Reader(row)
    run = Run(
        model=read.text("model", _told(facts, "model")),
        device=read.text("device", _told(facts, "device")),
        load=read.text("load"),
        policy=read.text("policy"),
        rate=read.number("offered_per_s", 0.0),
        requests=int(read.number("offered", 0.0)),
        pool_tokens=int(read.number("pool_tokens", 0.0)),
        at_once=None if (most := read.optional("max_running")) is None else int(most),
    )
    return Serving(
        run=run,
        preemption=read.text("preemption"),
        times=_times(read),
        curves=read.curves("curves"),
        throughput=read.number("throughput_tok_s"),
        figures={name: value for name in FIGURES if (value := read.optional(name)) is not None},
        tenants={name: _tenant(_Reader(own)) for name, own in read.tables("tenants").items()},
    )


def _times(read: _Reader) -> dict[str, float]:
    names = [f"{p}_{what}_ms" for what in ("ttft", "tbt") for p in PERCENTILES]
    return {name: value for name in names if (value := read.optional(name)) is not None}


def _tenant(read: _Reader) -> TenantTimes:
    return TenantTimes(_times(read), int(read.number("requests", 0.0)), read.number("service", 0.0))


def is_speed(row: Mapping[str, Any]) -> bool:
    return row.keys() >= _SPEED


def is_quality(row: Mapping[str, Any]) -> bool:
    return row.keys() >= _QUALITY


def speed(row: Mapping[str, Any], facts: Mapping[str, Any]) -> Speed:
    """``facts`` are the file's, for rows that do not name model or device. Raises ValueError that names the field."""
    read = _Reader(row)
    place = Place(
        model=read.text("model", _told(facts, "model")),
        device=read.text("device", _told(facts, "device")),
        context_tokens=int(read.number("context_tokens", 0.0)),
        batch=int(read.number("batch", 1.0)),
        tier=read.text("tier"),
        codec=read.text("codec"),
    )
    spread = (read.optional("fastest_ms"), read.optional("slowest_ms"))
    return Speed(
        place=place,
        setting=(read.text("method"), read.number("ratio")),
        share=read.optional("recomputed_share"),
        ttft=read.positive("ttft_ms"),
        full=read.positive("full_prefill_ms"),
        floor=read.optional("floor_ms") or None,
        floor_by=read.text("floor_by", ""),
        loaded=read.optional("bytes_loaded"),
        parts=read.numbers("parts_ms"),
        spread=None if spread[0] is None or spread[1] is None else (spread[0], spread[1]),
    )


def quality(row: Mapping[str, Any], facts: Mapping[str, Any]) -> Quality | None:
    """None where nothing was scored. ``facts`` are the file's, for rows that name no model. Raises ValueError."""
    read = _Reader(with_score(dict(row)))
    score = read.optional("score")
    if score is None:
        return None
    panel = Panel(
        model=read.text("model", _told(facts, "model")),
        suite=read.text("suite"),
        policy=read.text("context_policy"),
        condition=read.text("condition", ""),
        metric=read.text("metric"),
        questions=int(read.number("questions", 0.0)),
        contexts=int(read.number("worlds", 0.0)),
        tokens=round(read.number("context_tokens", 0.0)),
    )
    figures = {name: value for name in METRIC_NAMES if (value := read.optional(name)) is not None}
    return Quality(
        panel=panel,
        codec=read.text("codec"),
        setting=(read.text("method"), read.number("ratio")),
        share=read.number("recomputed_share"),
        score=score,
        interval=read.interval("score_interval"),
        difference=read.optional("difference_to_full"),
        difference_interval=read.interval("difference_interval"),
        by_kind=read.numbers("by_kind"),
        questions_by_kind={kind: int(asked) for kind, asked in read.numbers("questions_by_kind").items()},
        figures=figures,
        ttft=read.optional("median_ttft_ms"),
    )


def _told(facts: Mapping[str, Any], name: str) -> str:
    told = facts.get(name)
    return told if isinstance(told, str) else f"an unnamed {name}"


class _Reader:
    """Fields of a row by type. All raise ValueError naming the field."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def text(self, name: str, default: str | None = None) -> str:
        value = self._row.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is no text")
        return value

    def optional(self, name: str) -> float | None:
        value = self._row.get(name)
        return None if value is None else _finite(name, value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{name!r} is missing")
        return value

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            raise ValueError(f"{name!r} is not positive")
        return value

    def interval(self, name: str) -> Interval | None:
        value = self._row.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"{name!r} is no pair of bounds")
        return _finite(name, value[0]), _finite(name, value[1])

    def numbers(self, name: str) -> dict[str, float]:
        value = self._row.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError(f"{name!r} is no table of numbers")
        return {str(key): _finite(name, one) for key, one in value.items()}

    def tables(self, name: str) -> dict[str, dict[str, Any]]:
        value = self._row.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
            raise ValueError(f"{name!r} is no table of tables")
        return value

    def curves(self, name: str) -> dict[str, tuple[float, ...]]:
        value = self._row.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(one, list) for one in value.values()):
            raise ValueError(f"{name!r} is no table of lists")
        return {str(key): tuple(_finite(name, x) for x in one) for key, one in value.items()}


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name!r} is no finite number")
    return float(value)
