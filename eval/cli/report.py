"""``ragkv eval report``: result files as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragkv.eval.cli.options import err, out


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of `eval ttft`, `quality` and `serving`, or folders of such.")
    ],
    page: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "ragkv: what was measured",
) -> None:
    """One HTML page of result files, which stands alone: quality against speed, where the time goes, all figures."""
    from ragkv.eval.report import write_report

    read = write_report(results, page, title)
    if read.skipped:
        err.print(f"left out, nothing to show: {', '.join(read.skipped)}", style="dim", markup=False)
    runs = f", {len(read.serving)} serving runs" if read.serving else ""
    counts = f"{len(read.speed)} times and {len(read.quality)} scores{runs} of {len(read.sources)} files"
    out.print(f"{page}: {counts}", markup=False, highlight=False)
