"""Answer quality: the score over the recomputed share, and by kind of question, each panel beside full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ragkv.eval.palette import look
from ragkv.eval.report import words
from ragkv.eval.report.charts import Band, Point, colour, scatter
from ragkv.eval.report.html import Html, joined, percent, points, setting, tag
from ragkv.eval.report.legend import legend
from ragkv.eval.report.rows import Panel, Quality

_LEAST_POINTS = 3  # of a chart
_NO_GAIN, _FULL_SHADE = 0.005, 0.4  # a difference that is not shaded at all, one that is shaded fully


def section(rows: Sequence[Quality]) -> Html | None:
    """None without rows."""
    if not rows:
        return None
    panels = list(dict.fromkeys(row.panel for row in rows))
    # The policies of one condition side by side.
    runs = list(dict.fromkeys(_run(panel) for panel in panels))
    panels.sort(key=lambda panel: (runs.index(_run(panel)), panel.policy != "document"))
    return tag(
        "section",
        tag("h2", "Answer quality"),
        tag("div", [_panel(panel, [r for r in rows if r.panel == panel]) for panel in panels], class_="panels"),
        id="quality",
    )


def _run(panel: Panel) -> Panel:
    return panel._replace(policy="")


def _panel(panel: Panel, rows: Sequence[Quality]) -> Html:
    return tag(
        "div",
        tag("h3", words.sentence(words.conditions(panel))),
        tag(
            "p",
            f"{words.sentence(words.metric(panel))} of {words.data(panel)}: {panel.questions:,} questions over "
            f"{panel.contexts:,} contexts of about {panel.tokens:,} tokens.",
        ),
        _chart(panel, rows),
        _kinds(rows),
        class_="panel",
    )


def _chart(panel: Panel, rows: Sequence[Quality]) -> Html | None:
    """Of raw KV, if there is some. None where there are few points, which a table tells better."""
    codec = "raw" if any(row.codec == "raw" for row in rows) else rows[0].codec
    full = next((row for row in rows if row.setting[0] == "full"), None)
    others = [row for row in rows if row.setting[0] != "full" and row.codec == codec]
    if len(others) < _LEAST_POINTS:
        return None
    metric = words.metric(panel)
    nothing = [row for row in others if row.setting[0] == "none"]
    last = {row.setting[0]: row for row in sorted(others, key=lambda row: row.share)}
    drawn = [_point(row, metric, label=row.setting[0] if last[row.setting[0]] is row else "") for row in others]
    # A method that repairs nothing is plain reuse: every line starts there.
    lines = [method for method in last if method not in ("none", "default")]
    drawn += [replace(_point(row, metric), line=m, look=look(m), hidden=True) for row in nothing for m in lines]
    chart = scatter(
        drawn,
        title=f"{metric} against recomputed share",
        x_title="recomputed share of the context, %",
        y_title=f"{metric}, %",
        x_text=lambda value: f"{value:g}",
        band=_band(full, metric) if full else None,
    )
    return tag("figure", chart, legend((row.setting[0] for row in others), full=full is not None))


def _band(full: Quality, metric: str) -> Band:
    low, high = full.interval or (full.score, full.score)
    return Band(100 * full.score, 100 * low, 100 * high, f"full prefill: {metric} {percent(full.score)}")


def _point(row: Quality, metric: str, label: str = "") -> Point:
    low, high = row.interval or (row.score, row.score)
    tip = [setting(*row.setting), f"{metric} {percent(row.score)}"]
    tip[-1] += f" [{percent(low)}, {percent(high)}]" if row.interval else ""
    if row.difference is not None:
        tip.append(f"{points(row.difference)} points to full prefill")
    tip.append(f"{percent(row.share)} of the context recomputed")
    return Point(
        x=100 * row.share,
        y=100 * row.score,
        low=100 * low,
        high=100 * high,
        line=row.setting[0],
        look=look(row.setting[0]),
        label=label,
        tip="\n".join(tip),
    )


def _kinds(rows: Sequence[Quality]) -> Html | None:
    """A table shaded by the difference to full prefill. None where questions are of one kind."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.by_kind))
    if len(kinds) < 2:
        return None
    full = next((row for row in rows if row.setting[0] == "full"), None)
    asked = rows[0].questions_by_kind
    equal = len(set(asked.values())) == 1
    caption = "By kind of question, %" + (f", {next(iter(asked.values()))} questions each" if equal else "")
    heads = [tag("th", kind, None if equal else tag("small", asked.get(kind)), scope="col") for kind in kinds]
    shading = "; shaded by the difference to full prefill" if full else None
    body = [_kind_row(row, kinds, full) for row in rows]
    head = tag("thead", tag("tr", tag("th", "method", scope="col"), heads))
    table = tag("table", head, tag("tbody", body), class_="heat")
    return joined([tag("p", caption, shading, class_="caption"), tag("div", table, class_="scroll")])


def _kind_row(row: Quality, kinds: Sequence[str], full: Quality | None) -> Html:
    dot = tag("i", class_="dot", style=f"{colour(look(row.setting[0]))};background:currentColor")
    codec = None if row.codec == "raw" else tag("small", row.codec)
    name = tag("th", dot, setting(*row.setting), codec, scope="row")
    best = full.by_kind if full and row is not full else {}
    return tag("tr", name, [_kind_cell(row, kind, best.get(kind)) for kind in kinds])


def _kind_cell(row: Quality, kind: str, best: float | None) -> Html:
    score = row.by_kind.get(kind)
    if score is None:
        return tag("td")
    gain = 0.0 if best is None else score - best
    if abs(gain) < _NO_GAIN:
        return tag("td", f"{100 * score:.0f}")
    return tag(
        "td",
        f"{100 * score:.0f}",
        class_="better" if gain > 0 else "worse",
        style=f"--depth:{20 + 60 * min(abs(gain) / _FULL_SHADE, 1.0):.0f}%",
        data_tip=f"{setting(*row.setting)}, {kind}\n{points(gain)} points to full prefill",
    )
