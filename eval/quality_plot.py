"""Quality against recomputed share, drawn: a panel for each context policy and condition, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkv.errors import InputError, MissingExtraError
from ragkv.eval.palette import METRIC_NAMES, in_turn, look
from ragkv.eval.score import Row, wilson

_BEHIND = {"alone": "chunks encoded alone", "document": "chunks encoded behind their document"}
# Methods share their x: error bars stand side by side, a third of a point apart.
_APART = 0.33


def plot(rows: Sequence[Row], path: Path, *, kinds: bool = False) -> None:
    """Draw ``rows`` into ``path``, whose ending (.png, .svg, .pdf) says the format; ``kinds`` adds small
    panels, one for each kind of question, a row for every panel.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: a format matplotlib does not know.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib: pip install 'ragkv[plots]'", extra="plots") from error
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    policies = list(dict.fromkeys(row["context_policy"] for row in rows))
    panels = [(policy, condition) for condition in conditions for policy in policies]
    heights = [3.8 * len(conditions)] + [2.1] * (len(panels) if kinds else 0)
    figure = Figure(
        figsize=(13.0 if kinds else max(6.4, 5.6 * len(policies)), sum(heights) + 0.5), layout="constrained"
    )
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise InputError(f"{path} cannot be drawn: name a file that ends in .{', .'.join(sorted(known))}")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    grid = parts[0].subplots(len(conditions), len(policies), sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw(axes, _of(rows, panel))
        axes.set_title(_title(panel), fontsize=10, loc="left")
    for part, panel in zip(parts[1:], panels, strict=False):
        _draw_kinds(part, _of(rows, panel), _title(panel))
    parts[0].supxlabel("recomputed share of context token-layers, %", fontsize=10)
    parts[0].supylabel(", ".join({METRIC_NAMES[row["metric"]]: None for row in rows}) + ", %", fontsize=10)
    lines = {name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=160)


def _title(panel: tuple[str, str]) -> str:
    return f"{_BEHIND[panel[0]]}, {panel[1]}"


def _of(rows: Sequence[Row], panel: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row["context_policy"], row["condition"]) == panel]


def _draw_kinds(part: Any, rows: Sequence[Row], title: str) -> None:
    kinds = list(rows[0]["by_kind"])
    part.suptitle(title, fontsize=9, x=0.01, ha="left")
    for axes, kind in zip(part.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        _draw(axes, [_kind_row(row, kind) for row in rows], small=True)
        axes.set_title(kind, fontsize=9, loc="left")


def _kind_row(row: Row, kind: str) -> Row:
    share, asked = row["by_kind"][kind], row["questions_by_kind"][kind]
    interval = wilson(round(share * asked), asked) if row["metric"] == "exact_match" else None
    return {**row, "score": share, "score_interval": interval}


def _draw(axes: Any, rows: Sequence[Row], *, small: bool = False) -> None:
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7 if small else 9)
    for row in rows:
        if row["method"] == "full":
            colour, (low, high) = look("full").light, _bounds(row)
            axes.axhline(100 * row["score"], color=colour, linestyle="--", linewidth=1.2, label="full prefill")
            axes.axhspan(100 * low, 100 * high, color=colour, alpha=0.10, linewidth=0)
    nothing = [row for row in rows if row["method"] == "none"]
    methods = in_turn({row["method"] for row in rows} - {"full"})
    lines = [name for name in methods if name not in ("none", "default")]
    for name in methods:
        own = [row for row in rows if row["method"] == name]
        shift = _APART * (lines.index(name) - (len(lines) - 1) / 2) if name in lines else 0.0
        # A method that repairs nothing is plain reuse: every line starts there.
        starts = nothing if name in lines and all(row["ratio"] for row in own) else []
        _draw_method(axes, name, [*starts, *own], shift, small)


def _draw_method(axes: Any, name: str, rows: Sequence[Row], shift: float, small: bool) -> None:
    rows = sorted(rows, key=lambda row: row["recomputed_share"])
    colour, _, marker = look(name)
    shares = [100 * row["recomputed_share"] + (shift if row["recomputed_share"] else 0.0) for row in rows]
    matches = [100 * row["score"] for row in rows]
    reach = [[abs(100 * (row["score"] - _bounds(row)[side])) for row in rows] for side in (0, 1)]
    above = name in ("none", "default")
    axes.errorbar(
        shares,
        matches,
        yerr=None if small else reach,
        color=colour,
        marker=marker,
        markersize=(3.5 if small else 5.5) * (2.4 if marker == "*" else 1.0),
        markeredgecolor="white" if above else colour,
        markeredgewidth=0.6,
        linewidth=1.0 if small else 1.5,
        elinewidth=0.8,
        capsize=0 if small else 2,
        linestyle="none" if above else "-",
        zorder=4 if above else 3,
        label="none (plain reuse)" if name == "none" else name,
    )


def _bounds(row: Row) -> tuple[float, float]:
    """The score's interval; the score itself where there are too few contexts to tell."""
    low, high = row["score_interval"] or (row["score"], row["score"])
    return low, high
