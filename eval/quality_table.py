"""A quality run's rows on a terminal: one table for each context policy and condition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from ragkv.eval.palette import METRIC_NAMES
from ragkv.eval.score import Row

LEAST_WIDTH = 132
# What stands beside the score of a user's own questions.
_BESIDE = {
    "exact_match": ["f1", "answer_match"],
    "f1": ["exact_match", "answer_match"],
    "rouge_l": ["token_agreement"],
    "token_agreement": ["answer_match"],
}
_BEHIND = {"alone": "alone", "document": "behind their document"}


def show(console: Console, rows: Sequence[Row]) -> None:
    """Everything in percent; brackets hold 95% intervals."""
    wide = Console(file=console.file, width=max(console.width, LEAST_WIDTH))
    for (policy, condition), group in groupby(rows, lambda row: (row["context_policy"], row["condition"])):
        own = list(group)
        wide.print(f"[bold]chunks encoded {_BEHIND[policy]}, {condition}[/]: {_sample(own[0])}", highlight=False)
        wide.print(_table(own), end="\n\n")


def _sample(row: Row) -> str:
    text = f"{row['questions']} questions, {row['worlds']} {'contexts' if 'f1' in row else 'worlds'} of "
    text += f"{row['chunks']:.0f} chunks, {row['context_tokens']:,.0f} tokens"
    if row.get("questions_scored", row["questions"]) < row["questions"]:
        text += f"; {row['questions_scored']} have accepted answers"
    if row.get("questions_cut"):
        text += f"; {row['questions_cut']} contexts did not fit the model and lost chunks at their end"
    return text


def _table(rows: Sequence[Row]) -> Table:
    table, first = Table(box=None, header_style="dim"), rows[0]
    timed, kinds = "median_ttft_ms" in first, list(first["by_kind"])
    beside = [name for name in _BESIDE[first["metric"]] if "f1" in first and first[name] is not None]
    score, *others = (METRIC_NAMES[name] for name in (first["metric"], *beside))
    table.add_column("method")
    for name in ("ratio", score, "minus full", *others, "computed", *(["TTFT ms"] if timed else []), *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["method"], _percent(row["ratio"], 0), _share(row), _difference(row)]
        cells += [_percent(row[name]) for name in beside]
        cells.append(_percent(row["recomputed_share"]))
        cells += [f"{row['median_ttft_ms']:.0f}"] if timed else []
        table.add_row(*cells, *(_percent(row["by_kind"][kind], 0) for kind in kinds))
    return table


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def _share(row: Row) -> str:
    return f"{_percent(row['score'])} {_interval(row['score_interval'])}"


def _difference(row: Row) -> str:
    if row["difference_to_full"] is None or row["method"] == "full":
        return ""
    return f"{100 * row['difference_to_full']:+.1f} {_interval(row['difference_interval'])}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else "[{}, {}]".format(*(_percent(bound) for bound in bounds)).replace("[", r"\[")
