"""``ragkv eval report``: result files as one HTML page that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragkv.errors import InputError
from ragkv.eval.report.files import Results, read_results
from ragkv.eval.report.page import render

__all__ = ["write_report"]


def write_report(paths: Sequence[Path], out: Path, title: str = "ragkv: what was measured") -> Results:
    """Write the page of the result files (or folders of such) ``paths`` into ``out``; returns what was read.

    Raises:
        InputError: see :func:`ragkv.eval.report.files.read_results`; or ``out`` cannot be written.
    """
    results = read_results(paths)
    try:
        out.write_text(render(results, title), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; name a file in a folder that exists") from error
    return results
