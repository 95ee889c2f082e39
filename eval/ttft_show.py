"""Rows of ``ragkv eval ttft`` for people: a table's cells, what they are held against, bars with their floors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ragkv.eval.cache_policy_plot import check
from ragkv.eval.palette import FLOOR, look

Row = dict[str, Any]
LEAST_WIDTH = 120

_FULL, _FLOOR = look("full").light, FLOOR.light


def show(console: Console, rows: Sequence[Row]) -> None:
    """One line for each row, and what the speedups are against."""
    _table(console, [brief(row) for row in rows])
    _wide(console).print(footnote(rows), highlight=False)


def show_load(console: Console, rows: Sequence[Row]) -> None:
    """The same for rows of ``ragkv eval load``."""
    _table(console, [brief_load(row) for row in rows])
    row = rows[0]
    _wide(console).print(
        f"{row['context_tokens']} tokens from {row['tier']}, {row['codec']}: p{row['percentile']:g} within "
        f"{row['ttft_limit_ms']:.0f} ms; full prefill by {row['full_prefill_by']} ({row['device']})",
        highlight=False,
    )


def _wide(console: Console) -> Console:
    return Console(file=console.file, width=max(console.width, LEAST_WIDTH))


def _table(console: Console, rows: Sequence[dict[str, str]]) -> None:
    table = Table(box=None, header_style="dim")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("tier", "codec", "method", "bound by") else "right")
    for row in rows:
        table.add_row(*row.values())
    _wide(console).print(table)


def brief(row: Row) -> dict[str, str]:
    """The cells of a terminal's table."""
    return {
        "context": str(row["context_tokens"]),
        "tier": row["tier"],
        "codec": row["codec"],
        "method": _named(row),
        "ratio": f"{row['ratio']:.2f}",
        "computed": f"{row['recomputed_share']:.1%}",
        "TTFT ms": f"{row['ttft_ms']:.1f}",
        "speedup": f"{row['speedup']:.2f}x",
        "floor ms": f"{row['floor_ms']:.1f}",
        "bound by": row["floor_by"],
        "over floor": f"{row['over_floor']:.2f}x",
        "MB loaded": f"{row['bytes_loaded'] / 1e6:.1f}",
    }


def brief_load(row: Row) -> dict[str, str]:
    return {
        "method": _named(row),
        "ratio": f"{row['ratio']:.2f}",
        "requests/s": f"{row['requests_per_s']:.2f}",
        "to full": "" if row["relative_to_full"] is None else f"{row['relative_to_full']:.2f}x",
        **{f"{p} ms": f"{row.get(f'{p}_ttft_ms', float('nan')):.0f}" for p in ("p50", "p90", "p99")},
        "in time": f"{row.get('in_time', 0.0):.0%}" + ("" if row["confirmed"] else " (too few)"),
        "requests": str(row.get("requests", 0)),
        "alone ms": f"{row['service_ms']:.1f}",
    }


def _named(row: Row) -> str:
    return str(row["method"] + (f": {row['chose']}" if row["chose"] else ""))


def footnote(rows: Sequence[Row]) -> str:
    """What the speedups are against, one line for each context."""
    lines = {row["context_tokens"]: row for row in rows}
    return "\n".join(
        f"{context} tokens: full prefill takes the library {row['library_prefill_ms']:.1f} ms and ragkv "
        f"{row['ragkv_prefill_ms']:.1f} ms; speedups are against {row['full_prefill_by']}, "
        f"{row['full_prefill_tflops']:.3g} TFLOP/s, {row['full_prefill_of_matrix_rate']:.0%} of what the machine's own "
        f"matrix product gives ({row['device']})"
        for context, row in lines.items()
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw TTFT as bars, a panel for each context (down) and tier and codec (across), each bar with its floor.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: a format matplotlib does not know, or a folder that is not there.
    """
    check(path)
    from matplotlib.figure import Figure

    contexts = list(dict.fromkeys(row["context_tokens"] for row in rows))
    places = list(dict.fromkeys((row["tier"], row["codec"]) for row in rows))
    bars = max(sum(row["context_tokens"] == contexts[0] for row in rows) // len(places), 1)
    figure = Figure(
        figsize=(max(5.2, 4.4 * len(places)), (0.6 + 0.34 * bars) * len(contexts) + 1.0), layout="constrained"
    )
    grid = figure.subplots(len(contexts), len(places), squeeze=False, sharey="row", sharex="row")
    for down, context in enumerate(contexts):
        for across, (tier, codec) in enumerate(places):
            place = [r for r in rows if (r["context_tokens"], r["tier"], r["codec"]) == (context, tier, codec)]
            _draw(grid[down][across], place)
            grid[down][across].set_title(f"{context:,} tokens from {tier}, {codec}", fontsize=10, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("time to first token, ms", fontsize=9)
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['device']}", fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    names = [row["method"] + (f" {row['ratio']:.0%}" if 0 < row["ratio"] < 1 else "") for row in rows]
    times = [row["ttft_ms"] for row in rows]
    axes.barh(range(len(rows)), times, color=[look(row["method"]).light for row in rows], height=0.62)
    axes.vlines(
        [row["floor_ms"] for row in rows],
        [i - 0.42 for i in range(len(rows))],
        [i + 0.42 for i in range(len(rows))],
        color=_FLOOR,
        linewidth=2.5,
        label="floor: the machine at its best",
    )
    full = rows[0]["full_prefill_ms"]
    axes.axvline(full, color=_FULL, linestyle="--", linewidth=1.0, label="full prefill, the fastest")
    for i, row in enumerate(rows):
        # White reads on a long bar; a short one has room beside it.
        inside = row["ttft_ms"] > 0.7 * full
        text = f" {row['ttft_ms']:.0f} ms, {row['speedup']:.1f}x "
        axes.text(row["ttft_ms"], i, text, va="center", ha="right" if inside else "left", fontsize=8,
                  color="white" if inside else "black")  # fmt: skip
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
