"""Rows of ``ragkv eval serving`` for people: a table beside what it is held against, tenants, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ragkv.eval.cache_policy_plot import check
from ragkv.eval.palette import preemption_look
from ragkv.eval.serving_measures import QUANTILES, Row

LEAST_WIDTH = 172
BASELINE = "recompute"
_PERCENTILES = {"p50": "p50", "p95": "p95", "p99": "p99", "p999": "p99.9"}
_TEXTS = ("load", "policy", "preemption", "tenant")


def show(console: Console, rows: Sequence[Row]) -> None:
    """What requests saw and what it took, a line for each run and each simulated one; what each gains over recomputing;
    the same for each tenant."""
    lines = [line for row in rows for line in ([row, _simulated(row)] if "simulated" in row else [row])]
    _table(console, [seen(line) for line in lines])
    _table(console, [took(line) for line in lines])
    if gains := [gain for row in rows if (gain := gained(row, rows))]:
        _table(console, gains, title=f"times as good as {BASELINE}, same load")
    if tenants := [line for row in rows if len(row["tenants"]) > 1 for line in _tenants(row)]:
        _table(console, tenants, title="tenants")
    _wide(console).print(footnote(rows[0]), highlight=False)


def _named(row: Row) -> dict[str, str]:
    running = row.get("max_running")
    return {
        "load": row["load"],
        "policy": row["policy"],
        "preemption": row["preemption"],
        "at once": "" if running is None else str(running),
    }


def _tails(row: Row) -> dict[str, str]:
    """Of both times, under names that no two columns share."""
    cells = {}
    for margin, (what, form) in zip(("", " "), (("ttft", ",.0f"), ("tbt", ",.1f")), strict=True):
        for p, name in _PERCENTILES.items():
            head = f"{what.upper()} {name}" if p == "p50" else margin + name
            cells[head] = _number(row[f"{p}_{what}_ms"], form)
    return cells


def seen(row: Row) -> dict[str, str]:
    """What requests saw of a run."""
    unfinished = row["unfinished"] + row["refused"] + row["failed"]
    return {
        **_named(row),
        **_tails(row),
        "tok/s": f"{row['throughput_tok_s']:,.0f}",
        "req/s": f"{row['requests_s']:.2f}",
        "good/s": f"{row['goodput']:.2f}",
        "Jain": _number(row["jain"], ".3f"),
        "gap": _number(row["service_gap"], ",.0f"),
        "not done": str(unfinished) if unfinished else "",
    }


def took(row: Row) -> dict[str, str]:
    """What the engine did in a run."""
    return {
        **_named(row),
        "steps": f"{row['steps']:,.0f}",
        "ms a step": f"{row['step_ms']:,.2f}",
        "scheduling": _number(row["scheduler_ms"], ",.3f"),
        "of it": _number(row["scheduler_share"], ".2%"),
        "idle": f"{row['idle_share']:.0%}",
        "preemptions": f"{row['preemptions']:,.0f}",
        "a request": f"{row['preemption_rate']:.2f}",
        "MB out": f"{row['swap_out_bytes'] / 1e6:,.0f}",
        "MB in": f"{row['swap_in_bytes'] / 1e6:,.0f}",
        "hits": _number(row["prefix_hit_share"], ".0%"),
    }


def _simulated(row: Row) -> Row:
    """The simulator's line below a run's: it schedules in no time, and finds no prompts that merely begin alike."""
    unknown = {"scheduler_ms": None, "scheduler_share": None, "prefix_hit_share": None, "max_running": None}
    return {**row, **row["simulated"], **unknown, "load": "", "policy": "", "preemption": " simulated"}


def gained(row: Row, rows: Sequence[Row]) -> dict[str, str] | None:
    """Tails and throughput beside those of recomputing; None without that, or for it."""
    base = baseline(row, rows)
    if base is None or base is row:
        return None

    def times(key: str, *, more_is_better: bool = False) -> str:
        one, other = (row[key], base[key]) if more_is_better else (base[key], row[key])
        return f"{one / other:.2f}x" if one is not None and other else ""

    return {
        **_named(row),
        **{f"TTFT {p}": times(f"{p}_ttft_ms") for p in _PERCENTILES},
        **{f"TBT {p}": times(f"{p}_tbt_ms") for p in _PERCENTILES},
        "tok/s": times("throughput_tok_s", more_is_better=True),
        "goodput": times("goodput", more_is_better=True),
    }


def baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """The run that recomputed, of the same load and policy."""
    same = ("load", "policy", "offered_per_s", "pool_tokens", "max_running", "model")
    matching = (one for one in rows if one["preemption"] == BASELINE and all(one.get(k) == row.get(k) for k in same))
    return next(matching, None)


def _tenants(row: Row) -> list[dict[str, str]]:
    return [
        {
            **_named(row),
            "tenant": name,
            "requests": str(own["requests"]),
            "service": f"{own['service']:,.0f}",
            **_tails(own),
        }
        for name, own in row["tenants"].items()
    ]


def footnote(row: Row) -> str:
    updates = row["priority_updates"]
    ram = f", RAM {row['host_bytes'] / 1e9:.1f} GB" if "host_bytes" in row else ""
    how = f"; priorities change ({updates}) every {1 / row['update_frequency']:.0f} steps" if updates else ""
    return (
        f"{row['model']} on {row['device']}: {row['offered']} requests, {row['offered_per_s']:g} a second; the pool "
        f"holds {row['pool_tokens']:,} tokens{ram}{how}. Times in ms; good/s: requests within {row['slo_ttft_ms']:g} "
        f"ms to the first token and {row['slo_tbt_ms']:g} ms between tokens on average; gap: the most by which service "
        "over weight of two backlogged tenants differed; scheduling: ms of a step, and its share"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _wide(console: Console) -> Console:
    return Console(file=console.file, width=max(console.width, LEAST_WIDTH))


def _table(console: Console, rows: Sequence[dict[str, str]], title: str | None = None) -> None:
    table = Table(box=None, header_style="dim", title=title, title_justify="left")
    told = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in told:
        table.add_column(name, justify="left" if name in _TEXTS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in told))
    _wide(console).print(table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw how many wait longer than how long: TTFT and TBT (across), a panel for each load and policy (down).

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: a format matplotlib does not know, or a folder that is not there.
    """
    check(path)
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["load"], row["policy"]) for row in rows))
    figure = Figure(figsize=(10.5, 3.3 * len(groups) + 0.8), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for down, (load, policy) in enumerate(groups):
        own = [row for row in rows if (row["load"], row["policy"]) == (load, policy)]
        for axes, name, title in zip(
            grid[down], ("ttft", "tbt"), ("time to first token", "time between tokens"), strict=True
        ):
            _draw(axes, own, name)
            axes.set_title(f"{load}, {policy}: {title}", fontsize=10, loc="left")
            axes.set_xlabel("ms", fontsize=9)
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['device']}", fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _draw(axes: Any, rows: Sequence[Row], name: str) -> None:
    """On logarithmic axes, so that tails show."""
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        longer = tail(row["curves"][f"{name}_ms"])
        colour = preemption_look(row["preemption"]).light
        axes.plot([x for x, _ in longer], [y for _, y in longer], color=colour, linewidth=1.8, label=row["preemption"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(5e-4, 1.0)
    axes.set_yticks([1, 0.1, 0.01, 0.001], ["all", "10%", "1%", "0.1%"], fontsize=8)
    axes.set_ylabel("take longer", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)


def tail(curve: Sequence[float]) -> list[tuple[float, float]]:
    """(ms, share that takes longer) along a row's curve, without the ends that a logarithmic axis cannot show."""
    points = ((ms, 1 - q / 100) for ms, q in zip(curve, QUANTILES, strict=False))
    return [(ms, share) for ms, share in points if ms > 0 and share > 1e-9]
