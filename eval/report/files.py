"""Result files of ``ragkv eval``, read for a report: their rows, and where each file says it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkv.errors import InputError
from ragkv.eval.report.rows import Quality, Serving, Speed, is_quality, is_serving, is_speed, quality, serving, speed

_LEFT_OUT = frozenset({"rows", "environment"})


@dataclass(frozen=True)
class Source:
    """A result file: its name, what it holds, and what it tells about command, date, device and versions."""

    name: str
    holds: str
    facts: dict[str, Any]


@dataclass
class Results:
    """Everything that was read. ``skipped`` are files of a folder that hold nothing that is shown."""

    speed: list[Speed] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    serving: list[Serving] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def read_results(paths: Sequence[Path]) -> Results:
    """All rows of ``paths``, result files or folders of such.

    Raises:
        InputError: a file cannot be read, or was named and holds no rows of ``ragkv eval ttft | quality | serving``; a
            row is broken; there is nothing to report.
    """
    results = Results()
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            if not _read(file, results):
                if file is path:
                    raise InputError(
                        f"{path} holds no rows of `ragkv eval ttft`, `quality` or `serving`; make them with --save "
                        "or --json",
                        path=str(path),
                    )
                results.skipped.append(file.name)
    if not results.sources:
        raise InputError("nothing to report: none of the files holds rows of `ragkv eval ttft | quality | serving`")
    return results


def _read(file: Path, results: Results) -> bool:
    """Whether ``file`` had something to add."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", path=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}", path=str(file)) from error
    facts = content if isinstance(content, dict) else {}
    rows = facts.get("rows") if facts else content
    facts = {**facts, **facts["environment"]} if isinstance(facts.get("environment"), dict) else facts
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    before = len(results.speed), len(results.quality), len(results.serving)
    for number, row in enumerate(rows, 1):
        try:
            if is_speed(row):
                results.speed.append(speed(row, facts))
            elif is_quality(row) and (scored := quality(row, facts)):
                results.quality.append(scored)
            elif is_serving(row):
                results.serving.append(serving(row, facts))
        except ValueError as error:
            raise InputError(f"{file}, row {number}: {error}", path=str(file), row=number) from error
    now = len(results.speed), len(results.quality), len(results.serving)
    added = {kind: n - b for kind, n, b in zip(("speed", "quality", "serving"), now, before, strict=True)}
    holds = " and ".join(f"{count} rows of {kind}" for kind, count in added.items() if count)
    if holds:
        told = {key: value for key, value in facts.items() if key not in _LEFT_OUT}
        results.sources.append(Source(file.name, holds, told))
    return bool(holds)
