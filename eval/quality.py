"""``ragkv eval quality``: answers under methods, ratios, context policies and conditions, on invented worlds or on a
user's own questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ragkv.checkpoint import load_tokenizer
from ragkv.config import Settings
from ragkv.errors import ConfigError
from ragkv.eval.asker import Bench, Setting
from ragkv.eval.cases import Case, Condition, Draw, draw_cases
from ragkv.eval.data import Data, data_cases
from ragkv.eval.jobs import Say, ask_all
from ragkv.eval.score import JUDGES, WORLD_JUDGES, Judge, Row, rows_of
from ragkv.retrievers import Splitter
from ragkv.tokenizer import chunk_text
from ragkv.types import ContextPolicy, Method


def grid(
    methods: Sequence[Method], ratios: Sequence[float], policies: Sequence[ContextPolicy], shipped: float
) -> list[Setting]:
    """Every method at every ratio under every policy. ``full`` and ``none`` have no ratio to choose; ``default`` is
    what ragkv does when nothing is asked for, at its ``shipped`` ratio."""
    fixed: dict[Method, list[float]] = {"full": [1.0], "none": [0.0], "default": [shipped]}
    return [Setting(m, ratio, policy) for policy in policies for m in methods for ratio in fixed.get(m, ratios)]


def measure_quality(
    settings: Settings,
    asked: Sequence[Setting],
    conditions: Sequence[Condition],
    draw: Draw | Data,
    *,
    jobs: int = 1,
    each_alone: bool = False,
    say: Say,
) -> list[Row]:
    """A row for each condition and setting, on invented worlds or a user's own questions; the same rows however many
    ``jobs`` there are.

    All conditions get the same questions, so that they can be compared: with ``neighbour-missing`` among them,
    only questions that have a neighbour to miss.

    Raises:
        ConfigError: the metric does not go with the questions, the methods or the conditions.
        InputError: the worlds hold too few questions, or their prompts do not fit the model.
        ModelError: the model cannot be used.
    """
    test = _worlds(settings, draw, conditions) if isinstance(draw, Draw) else _own(settings, draw, asked, conditions)
    bench = Bench(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        cache_dir=settings.data_dir.expanduser(),
        context_tokens=settings.context_tokens,
        # Processes that each start a thread per core are slower than one process.
        threads=settings.threads or (1 if jobs > 1 else 0),
        settings=tuple(asked),
        conditions=tuple(conditions),
        each_alone=each_alone,
        codec=settings.kv_codec,
        check_layer=settings.check_layer,
        **test.answering,
    )
    marks = ask_all(bench, test.cases, jobs=jobs, say=say)
    rows = rows_of(asked, conditions, marks, metric=test.metric, judges=test.judges)
    run = {"suite": test.name, "model": settings.model, "codec": settings.kv_codec, "check_layer": settings.check_layer}
    return [run | row for row in rows]


class _Test(NamedTuple):
    """What is asked, how it is answered (of :class:`Bench`), and how answers are judged."""

    name: str
    cases: list[Case]
    answering: dict[str, Any]
    metric: str
    judges: Mapping[str, Judge]


def _worlds(settings: Settings, draw: Draw, conditions: Sequence[Condition]) -> _Test:
    draw = replace(draw, neighbours="neighbour-missing" in conditions)
    tokenizer = load_tokenizer(settings.model)
    cases = draw_cases(draw, lambda d: sum(len(tokenizer.plain(chunk_text(chunk))) for chunk in d.chunks))
    return _Test("worlds", cases, {}, "exact_match", WORLD_JUDGES)


def _own(settings: Settings, data: Data, asked: Sequence[Setting], conditions: Sequence[Condition]) -> _Test:
    metric = data.judged_by()
    if metric == "token_agreement" and not any(setting.work.method == "full" for setting in asked):
        raise ConfigError("agreement is with full prefill: add `full` to --methods")
    if "neighbour-missing" in conditions:
        raise ConfigError("--condition neighbour-missing: only of worlds is it known which chunks a question needs")
    tokenizer = load_tokenizer(settings.model)
    splitter = Splitter(
        tokenizer.count, settings.chunk_tokens, count_batch=tokenizer.count_many, tokenizer=tokenizer.fingerprint
    )
    answering = {"answer_tokens": data.room(), "cuts": True}
    return _Test(data.name, data_cases(data, splitter), answering, metric, JUDGES)
