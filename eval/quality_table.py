"""A quality run's rows on a terminal: one table for each context policy and condition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from ragkv.eval.score import Row
from ragkv.eval.worlds import KINDS

LEAST_WIDTH = 132
_BEHIND = {"alone": "alone", "document": "behind their document"}


def show(console: Console, rows: Sequence[Row]) -> None:
    """Everything in percent; brackets hold 95% intervals."""
    wide = Console(file=console.file, width=max(console.width, LEAST_WIDTH))
    for (policy, condition), group in groupby(rows, lambda row: (row["context_policy"], row["condition"])):
        own = list(group)
        wide.print(f"[bold]chunks encoded {_BEHIND[policy]}, {condition}[/]: {_sample(own[0])}", highlight=False)
        wide.print(_table(own), end="\n\n")


def _sample(row: Row) -> str:
    return (
        f"{row['questions']} questions, {row['worlds']} worlds of {row['chunks']:.0f} chunks, "
        f"{row['context_tokens']:,.0f} tokens"
    )


def _table(rows: Sequence[Row]) -> Table:
    table, first = Table(box=None, header_style="dim"), rows[0]
    timed = "median_ttft_ms" in first
    kinds = [kind for kind in KINDS if kind in first["by_kind"]]
    table.add_column("method")
    for name in ("ratio", "exact match", "minus full", "computed", *(["TTFT ms"] if timed else []), *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["method"], _percent(row["ratio"], 0), _share(row), _difference(row)]
        cells.append(_percent(row["recomputed_share"]))
        cells += [f"{row['median_ttft_ms']:.0f}"] if timed else []
        table.add_row(*cells, *(_percent(row["by_kind"][kind], 0) for kind in kinds))
    return table


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def _share(row: Row) -> str:
    return f"{_percent(row['exact_match'])} {_interval(row['exact_match_interval'])}"


def _difference(row: Row) -> str:
    if row["difference_to_full"] is None or row["method"] == "full":
        return ""
    return f"{100 * row['difference_to_full']:+.1f} {_interval(row['difference_interval'])}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else "[{}, {}]".format(*(_percent(bound) for bound in bounds)).replace("[", r"\[")
