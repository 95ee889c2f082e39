"""Serving: how many wait longer than how long, and every run's figures beside those of recomputing."""

from __future__ import annotations

from collections.abc import Sequence

from ragkv.eval.palette import preemption_look
from ragkv.eval.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, colour, grid
from ragkv.eval.report.html import Html, ms, percent, tag
from ragkv.eval.report.legend import swatches
from ragkv.eval.report.rows import Run, Serving
from ragkv.eval.serving_measures import PERCENTILES, QUANTILES

_BASELINE = "recompute"
_FEWEST = 0.05  # percent: the end of the tails that are drawn
_CHARTS = {"ttft": "Time to first token", "tbt": "Time between tokens"}
_NAMES = {"p50": "p50", "p95": "p95", "p99": "p99", "p999": "p99.9"}


def section(rows: Sequence[Serving]) -> Html | None:
    """None without rows."""
    if not rows:
        return None
    groups: dict[Run, list[Serving]] = {}
    for row in rows:
        groups.setdefault(row.run, []).append(row)
    ways = dict.fromkeys(row.preemption for row in rows)
    return tag(
        "section",
        tag("h2", "Serving"),
        tag(
            "p",
            "Many requests on one engine, each group of runs at the same load. Lines tell how many of them wait longer "
            "than how long: further to the left is better. Figures in green and red are of a run beside the one that "
            "throws a preempted request's KV away and computes it again.",
        ),
        swatches((way, _shade(way)) for way in ways),
        [_group(run, own) for run, own in groups.items()],
        id="serving",
    )


def _group(run: Run, rows: Sequence[Serving]) -> Html:
    facts = f"{run.requests:,} requests at {run.rate:g} a second, pool of {run.pool_tokens:,} tokens"
    charts = [tag("div", tag("h4", title), _tails(rows, name), class_="panel") for name, title in _CHARTS.items()]
    return tag(
        "div",
        tag("h3", f"{run.load}, {run.policy}", tag("small", f"{run.model} on {run.device}; {facts}")),
        tag("div", charts, class_="panels") if any(row.curves for row in rows) else None,
        _table(rows),
        class_="group",
    )


def _tails(rows: Sequence[Serving], name: str) -> Html | None:
    lines = {row.preemption: tail(row.curves.get(f"{name}_ms", ())) for row in rows}
    every = [value for line in lines.values() for value, _ in line]
    if not every:
        return None
    x = Axis(min(every) / 1.2, max(every) * 1.2, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(_FEWEST, 100.0, HEIGHT - BOTTOM, TOP, log=True)
    return tag(
        "svg",
        grid(x, y, lambda value: ms(value).replace(".0 ", " "), f"{_CHARTS[name].lower()}", "% wait longer"),
        [_line(way, line, x, y) for way, line in lines.items() if line],
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_label=_CHARTS[name],
        class_="chart",
    )


def _line(way: str, line: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Html:
    path = " ".join(f"{x(value)},{y(share)}" for value, share in line)
    marks = [
        tag("circle", cx=x(value), cy=y(share), r=3.2, class_="point", role="img", data_tip=True,
            aria_label=f"{way}\n{share:.3g}% wait longer than {ms(value)}")
        for value, share in line if share in (50.0, 5.0, 1.0) or share == line[-1][1]
    ]  # fmt: skip
    return tag("g", tag("polyline", points=path, class_="line tail"), marks, style=colour(preemption_look(way)))


def tail(curve: Sequence[float]) -> list[tuple[float, float]]:
    """(ms, percent that wait longer), as far as a logarithmic chart shows it."""
    points = ((value, round(100 - q, 6)) for value, q in zip(curve, QUANTILES, strict=False))
    return [(value, share) for value, share in points if value > 0 and share >= _FEWEST]


def _table(rows: Sequence[Serving]) -> Html:
    base = next((row for row in rows if row.preemption == _BASELINE), None)
    times = [f"{p}_{what}_ms" for what in _CHARTS for p in PERCENTILES]
    heads = [f"{what.upper()} {_NAMES[p]}" for what in _CHARTS for p in PERCENTILES]
    heads += ["tokens/s", "good/s", "preempted", "MB moved", "scheduler", "idle", "Jain", "gap", "not done"]
    body = [
        tag(
            "tr",
            tag("th", _dot(row.preemption), row.preemption, scope="row"),
            [_time(row, base, key) for key in times],
            _more(row.throughput, base.throughput if base else None, f"{row.throughput:,.0f}"),
            _rest(row),
        )
        for row in rows
    ]
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", tag("th"), [tag("th", head) for head in heads])), tag("tbody", body),
            class_="heat"),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="figures of every run",
    )  # fmt: skip


def _rest(row: Serving) -> list[Html]:
    texts = [f"{row.goodput:.2f}", f"{row.preempted:.2f}", f"{row.moved / 1e6:,.0f}", percent(row.scheduler, 2),
             percent(row.idle), "" if row.jain is None else f"{row.jain:.3f}",
             "" if row.gap is None else f"{row.gap:,.0f}", str(row.unfinished or "")]  # fmt: skip
    return [tag("td", text) for text in texts]


def _time(row: Serving, base: Serving | None, key: str) -> Html:
    value = row.times.get(key)
    if value is None:
        return tag("td")
    other = base.times.get(key) if base else None
    return _more(1 / value if value else 0.0, 1 / other if other else None, ms(value))


def _more(value: float, base: float | None, text: str) -> Html:
    """Shaded by how many times ``base`` it is: fully from four times on."""
    if not base or not value or value == base:
        return tag("td", text)
    times = value / base
    depth = min(max(times, 1 / times) - 1, 3) / 3
    return tag(
        "td",
        text,
        class_="better" if times > 1 else "worse",
        style=f"--depth:{60 * depth:.0f}%",
        aria_label=f"{text}: {times:.2f} times as good as {_BASELINE}",
        data_tip=True,
    )


def _dot(way: str) -> Html:
    return tag("span", class_="dot", style=f"background:{_shade(way)}")


def _shade(way: str) -> str:
    return colour(preemption_look(way)).removeprefix("color:")
