"""``ragkv eval quality``: answers on invented worlds under methods, ratios, context policies and conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ragkv.checkpoint import load_tokenizer
from ragkv.config import Settings
from ragkv.errors import InputError
from ragkv.eval.asker import Bench, Setting
from ragkv.eval.cases import Condition, Draw, draw_cases
from ragkv.eval.jobs import Say, ask_all
from ragkv.eval.score import Row, rows_of
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
    draw: Draw,
    *,
    jobs: int = 1,
    each_alone: bool = False,
    say: Say,
) -> list[Row]:
    """A row for each condition and setting; the same rows however many ``jobs`` there are.

    All conditions get the same questions, so that they can be compared: with ``neighbour-missing`` among them,
    only questions that have a neighbour to miss.

    Raises:
        InputError: the worlds hold too few questions, or their prompts do not fit the model.
        ModelError: the model cannot be used.
    """
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
    )
    draw = replace(draw, neighbours="neighbour-missing" in conditions)
    tokenizer = load_tokenizer(settings.model)
    cases = draw_cases(draw, lambda d: sum(len(tokenizer.plain(chunk_text(chunk))) for chunk in d.chunks))
    return rows_of(asked, conditions, ask_all(bench, cases, jobs=jobs, say=say))


def read_rows(path: Path) -> list[Row]:
    """Rows that an earlier run printed as JSON. Raises InputError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows["rows"] if isinstance(rows, dict) else rows
        if rows and all({"method", "exact_match_interval", "by_kind"} <= row.keys() for row in rows):
            return list(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no rows of a quality run: {error}", path=str(path)) from error
    raise InputError(f"{path} holds no rows of a quality run; make them with --json", path=str(path))
