"""A calibration on a terminal, and drawn: loss and first-token divergence against recomputed share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ragkv.eval.cache_policy_plot import check
from ragkv.eval.calibrate import Asked, Result, Row
from ragkv.eval.choice import RAW
from ragkv.eval.palette import in_turn, look

_ASKED: dict[Asked, str] = {
    "given": "questions given",
    "written": "questions that the model wrote",
    "continued": "sentences to be continued",
}
_CHOSEN = "#D00000"
_LEAST_WIDTH = 100


def show(console: Console, result: Result) -> None:
    """What was measured, cheapest first, then what was chosen."""
    wide = Console(file=console.file, width=max(console.width, _LEAST_WIDTH))
    table = Table(box=None, header_style="dim")
    table.add_column("method")
    names = ("ratio", "codec", "recomputed", "asked", "loss %", "95%", "tokens %", "KL", "right %")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(result.rows, key=lambda row: (row["recomputed_share"], row["bytes_share"])):
        table.add_row(*_cells(row), style="bold" if row["chosen"] else None)
    wide.print(table)
    chosen = result.calibration
    right = "" if result.full_right is None else f"; full prefill answers {result.full_right:.1%} right"
    console.print(f"\n{chosen.questions} {_ASKED[result.asked]}{right}", highlight=False)
    for warning in result.warnings:
        console.print(Text(f"note: {warning}", style="yellow"))
    console.print(f"[bold]{_setting(result)}[/]: {_says(result)}", highlight=False)


def _cells(row: Row) -> list[str]:
    low, high = row["loss_interval"]
    return [
        ("→ " if row["chosen"] else "  ") + row["method"],
        f"{row['ratio']:.2f}",
        row["codec"],
        f"{row['recomputed_share']:.1%}",
        str(row["questions"]),
        f"{'' if row['complete'] else '~'}{100 * row['loss']:.1f}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        f"{100 * row['token_agreement']:.1f}",
        "∞" if row["first_token_kl"] is None else f"{row['first_token_kl']:.3g}",
        "" if row["right"] is None else f"{100 * row['right']:.0f}",
    ]


def _setting(result: Result) -> str:
    return ", ".join(f"{name} = {value}" for name, value in result.values.items())


def _says(result: Result) -> str:
    chosen = result.calibration
    if chosen.method == "full":
        return "every prompt is prefilled in full"
    low, high = chosen.loss_interval
    return (
        f"{chosen.recomputed_share:.1%} of the context recomputed, loss {chosen.loss:.1%} [{low:.1%}, {high:.1%}], "
        f"wanted {chosen.wanted_loss:.1%}"
    )


def plot(result: Result, path: Path) -> None:
    """Draw into ``path``, whose ending says the format.

    Raises:
        MissingExtraError, InputError: see ``cache_policy_plot.check``.
    """
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    losses, divergences = figure.subplots(1, 2)
    _draw(losses, result.rows, "loss", 100.0)
    losses.axhline(
        100 * result.calibration.wanted_loss, color=_CHOSEN, linestyle="--", linewidth=1.0, label="wanted loss"
    )
    losses.set_ylabel("loss against full prefill, %")
    losses.set_ylim(bottom=0)
    _draw(divergences, result.rows, "pilot_kl", 1.0)
    divergences.set_ylabel("first token: KL to full prefill, nats")
    divergences.set_title("on the questions that all were asked", fontsize=9, loc="left")
    divergences.set_yscale("symlog", linthresh=1e-3)
    divergences.set_ylim(0, 3 * max((row["pilot_kl"] or 0.0 for row in result.rows), default=0.0) or None)
    losses.set_title("filled: asked everything; hollow: estimated from a few questions", fontsize=9, loc="left")
    for axes in (losses, divergences):
        axes.set_xlabel("recomputed share of context token-layers, %")
    figure.suptitle(f"{result.calibration.model}: {_setting(result)}", fontsize=10, x=0.01, ha="left")
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def _draw(axes: Any, rows: Sequence[Row], measure: str, scale: float) -> None:
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = [row for row in rows if row[measure] is not None]
    for method in in_turn({row["method"] for row in drawn}):
        own = sorted(
            (row for row in drawn if row["method"] == method and row["codec"] == RAW),
            key=lambda row: row["recomputed_share"],
        )
        colour, marker = look(method).light, look(method).marker
        axes.plot(*_points(own, measure, scale), color=colour, linewidth=1.2, alpha=0.8, zorder=2)
        for row in own:
            axes.errorbar(
                *_points([row], measure, scale),
                yerr=[[bound] for bound in _reach(row)] if measure == "loss" and row["complete"] else None,
                color=colour, marker=marker, markersize=5, markerfacecolor=colour if row["complete"] else "white",
                elinewidth=0.8, capsize=2, linestyle="none", zorder=3, label=method if row is own[0] else None,
            )  # fmt: skip
    if best := [row for row in drawn if row["chosen"]]:
        axes.plot(
            *_points(best, measure, scale), marker="o", markersize=12, markerfacecolor="none", color=_CHOSEN,
            markeredgewidth=1.8, linestyle="none", label="chosen",
        )  # fmt: skip


def _points(rows: Sequence[Row], measure: str, scale: float) -> tuple[list[float], list[float]]:
    return [100 * row["recomputed_share"] for row in rows], [scale * row[measure] for row in rows]


def _reach(row: Row) -> tuple[float, float]:
    low, high = row["loss_interval"]
    return max(0.0, 100 * (row["loss"] - low)), max(0.0, 100 * (high - row["loss"]))
