"""Serving: how many wait longer than how long, and every run's figures beside those of recomputing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ragkv.eval.palette import preemption_look
from ragkv.eval.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, colour, grid
from ragkv.eval.report.html import Html, ms, tag
from ragkv.eval.report.legend import swatches
from ragkv.eval.report.rows import Run, Serving, TenantTimes
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
            "than how long: further to the left is better. Shaded figures are of a run beside the one that throws a "
            "preempted request's KV away and computes it again. Times are in ms where no unit stands; Jain's index and "
            "the largest gap are of tenants' service over weight while they were backlogged.",
        ),
        swatches((way, _shade(way)) for way in ways),
        [_group(run, own) for run, own in groups.items()],
        id="serving",
    )


def _group(run: Run, rows: Sequence[Serving]) -> Html:
    most = f", {run.at_once:,} at once" if run.at_once else ""
    facts = f"{run.requests:,} requests at {run.rate:g} a second{most}, pool of {run.pool_tokens:,} tokens"
    charts = [tag("div", tag("h4", title), _tails(rows, name), class_="panel") for name, title in _CHARTS.items()]
    return tag(
        "div",
        tag("h3", f"{run.load}, {run.policy}", tag("small", f"{run.model} on {run.device}; {facts}")),
        tag("div", charts, class_="panels") if any(row.curves for row in rows) else None,
        _seen(rows),
        _took(rows),
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
        grid(x, y, _tick, f"{_CHARTS[name].lower()}", "% wait longer"),
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


def _tick(value: float) -> str:
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:,g} s"


def tail(curve: Sequence[float]) -> list[tuple[float, float]]:
    """(ms, percent that wait longer), as far as a logarithmic chart shows it."""
    points = ((value, round(100 - q, 6)) for value, q in zip(curve, QUANTILES, strict=False))
    return [(value, share) for value, share in points if value > 0 and share >= _FEWEST]


def _seen(rows: Sequence[Serving]) -> Html:
    """What requests saw, in all and by tenant."""
    base = next((row for row in rows if row.preemption == _BASELINE), None)
    heads = [f"{what.upper()} {_NAMES[p]}" for what in _CHARTS for p in PERCENTILES]
    heads += ["tokens/s", "requests/s", "good/s", "Jain", "gap", "not done"]
    body = []
    for row in rows:
        body.append(tag("tr", _head(row), _times(row.times, base), _rates(row, base)))
        if len(row.tenants) > 1:
            body += [_tenant(name, own) for name, own in row.tenants.items()]
    return _table("what requests saw", heads, body)


def _tenant(name: str, own: TenantTimes) -> Html:
    said = f"{own.requests} requests, served {own.service:,.0f}"
    return tag("tr", tag("th", tag("small", name), scope="row"), _times(own.times, None), tag("td", said, colspan=6))


def _rates(row: Serving, base: Serving | None) -> list[Html]:
    figures = row.figures
    lost = sum(figures.get(fate, 0.0) for fate in ("unfinished", "refused", "failed"))
    texts = [_figure(figures, "requests_s", ".2f"), _figure(figures, "goodput", ".2f"), _figure(figures, "jain", ".3f"),
             _figure(figures, "service_gap", ",.0f"), f"{lost:.0f}" if lost else ""]  # fmt: skip
    throughput = _more(row.throughput, base.throughput if base else None, f"{row.throughput:,.0f}")
    return [throughput, *(tag("td", text) for text in texts)]


# Of the engine: a head, the figure, what it is multiplied by, and its form.
_ENGINE = (
    ("steps", "steps", 1.0, ",.0f"),
    ("ms a step", "step_ms", 1.0, ",.2f"),
    ("scheduling ms", "scheduler_ms", 1.0, ".3f"),
    ("of a step", "scheduler_share", 1.0, ".2%"),
    ("idle", "idle_share", 1.0, ".1%"),
    ("preemptions", "preemptions", 1.0, ",.0f"),
    ("a request", "preemption_rate", 1.0, ".2f"),
    ("MB out", "swap_out_bytes", 1e-6, ",.0f"),
    ("MB in", "swap_in_bytes", 1e-6, ",.0f"),
    ("prefix hits", "prefix_hit_share", 1.0, ".0%"),
)


def _took(rows: Sequence[Serving]) -> Html:
    """What the engine did."""
    body = [
        tag("tr", _head(row), [tag("td", _figure(row.figures, name, form, by)) for _, name, by, form in _ENGINE])
        for row in rows
    ]
    return _table("what the engine did", [head for head, *_ in _ENGINE], body)


def _table(name: str, heads: Sequence[str], body: Sequence[Html]) -> Html:
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", tag("th"), [tag("th", head) for head in heads])), tag("tbody", body),
            class_="heat"),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=name,
    )  # fmt: skip


def _head(row: Serving) -> Html:
    return tag("th", _dot(row.preemption), row.preemption, scope="row")


def _figure(figures: Mapping[str, float], name: str, form: str, by: float = 1.0) -> str:
    return f"{by * figures[name]:{form}}" if name in figures else ""


def _times(times: Mapping[str, float], base: Serving | None) -> list[Html]:
    keys = [f"{p}_{what}_ms" for what in _CHARTS for p in PERCENTILES]
    return [_time(times.get(key), base.times.get(key) if base else None) for key in keys]


def _time(value: float | None, other: float | None) -> Html:
    if value is None:
        return tag("td")
    return _more(1 / value if value else 0.0, 1 / other if other else None, ms(value).removesuffix(" ms"))


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
