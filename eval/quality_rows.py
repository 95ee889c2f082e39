"""Rows of an earlier quality run, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ragkv.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Rows that an earlier run printed as JSON or saved. Raises InputError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows["rows"] if isinstance(rows, dict) else rows
        if rows and all({"method", "exact_match_interval", "by_kind"} <= row.keys() for row in rows):
            return [with_score(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no rows of a quality run: {error}", path=str(path)) from error
    raise InputError(f"{path} holds no rows of a quality run; make them with --json", path=str(path))


def with_score(row: Row) -> Row:
    """``row``, which may be of a version that knew exact match alone, with its metric and score."""
    score = {"score": row["exact_match"], "score_interval": row.get("exact_match_interval")}
    return {"suite": "worlds", "metric": "exact_match", "codec": "raw"} | score | row
