"""Every row as a table that sorts at a click on a column's head, and where the files come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from ragkv.eval.palette import METRIC_NAMES
from ragkv.eval.report.files import Source
from ragkv.eval.report.html import Html, percent, points, tag
from ragkv.eval.report.rows import Interval, Quality, Speed

R = TypeVar("R")


class Cell(NamedTuple):
    """What stands there, and what it sorts by."""

    text: str
    value: float | str


_EMPTY = Cell("", "")
# Of what was measured, not measured: said once where all rows agree.
_FACTS = ("model", "device", "context", "at once", "tier", "codec", "questions of", "encoded", "condition", "metric",
          "questions", "contexts")  # fmt: skip
_FIRST = ("command", "date", "device", "model", "note", "notes", "dtype", "versions", "rates")
Column = tuple[str, Callable[[R], Cell]]


def speed_table(rows: Sequence[Speed]) -> Html | None:
    columns: list[Column[Speed]] = [
        ("model", lambda r: _word(r.place.model)),
        ("device", lambda r: _word(r.place.device)),
        ("context", lambda r: _number(r.place.context_tokens, ",.0f")),
        ("at once", lambda r: _number(r.place.batch, ".0f")),
        ("tier", lambda r: _word(r.place.tier)),
        ("codec", lambda r: _word(r.place.codec)),
        ("method", lambda r: _word(r.setting[0])),
        ("ratio", lambda r: _number(r.setting[1], ".2f")),
        ("computed", lambda r: _share(r.share)),
        ("TTFT ms", lambda r: _number(r.ttft, ",.1f")),
        ("fastest", lambda r: _number(r.spread and r.spread[0], ",.1f")),
        ("slowest", lambda r: _number(r.spread and r.spread[1], ",.1f")),
        ("full ms", lambda r: _number(r.full, ",.1f")),
        ("speedup", lambda r: _number(r.speedup, ".2f", "×")),
        ("floor ms", lambda r: _number(r.floor, ",.1f")),
        ("bound by", lambda r: _word(r.floor_by)),
        ("over floor", lambda r: _number(r.ttft / r.floor if r.floor else None, ".2f", "×")),
        ("MB loaded", lambda r: _number(r.loaded and r.loaded / 1e6, ",.1f")),
    ]
    return _section("Every measured time", "times", rows, columns)


def quality_table(rows: Sequence[Quality]) -> Html | None:
    columns: list[Column[Quality]] = [
        ("model", lambda r: _word(r.panel.model)),
        ("questions of", lambda r: _word(r.panel.suite)),
        ("encoded", lambda r: _word(r.panel.policy)),
        ("condition", lambda r: _word(r.panel.condition)),
        ("codec", lambda r: _word(r.codec)),
        ("method", lambda r: _word(r.setting[0])),
        ("ratio", lambda r: _number(r.setting[1], ".2f")),
        ("computed", lambda r: _share(r.share)),
        ("metric", lambda r: _word(METRIC_NAMES.get(r.panel.metric, r.panel.metric))),
        ("score", lambda r: _with_bounds(percent, r.score, r.interval)),
        ("minus full", lambda r: _difference(r)),
        *((name, _figure(key)) for key, name in METRIC_NAMES.items() if any(key != r.panel.metric for r in rows)),
        ("questions", lambda r: _number(r.panel.questions, ",.0f")),
        ("contexts", lambda r: _number(r.panel.contexts, ",.0f")),
        ("tokens", lambda r: _number(r.panel.tokens, ",.0f")),
        ("TTFT ms", lambda r: _number(r.ttft, ",.1f")),
    ]
    return _section("Every measured quality", "scores", rows, columns)


def sources(files: Sequence[Source]) -> Html:
    """Command, date, device and versions as each file tells them."""
    return tag("section", tag("h2", "Where it comes from"), [_source(file) for file in files], id="sources")


def _source(file: Source) -> Html:
    told = {key: text for key, value in file.facts.items() if (text := _fact(value))}
    order = sorted(told, key=lambda key: [*_FIRST, key].index(key))
    facts = [tag("div", tag("dt", key.replace("_", " ")), tag("dd", told[key])) for key in order]
    return tag(
        "details",
        tag("summary", tag("b", file.name), tag("small", file.holds)),
        tag("dl", facts) if facts else tag("p", "The file does not tell: make it with --save."),
        open=True,
    )


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}" for key, one in value.items() if (text := _fact(one)))
    if isinstance(value, list):
        return "; ".join(filter(None, map(_fact, value)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value}" if isinstance(value, int) and abs(value) < 1e9 else _short(value)
    return value if isinstance(value, str) else ""


def _short(value: float) -> str:
    """Four figures, with T, G or M for large numbers."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def _figure(key: str) -> Callable[[Quality], Cell]:
    return lambda row: _share(row.figures.get(key) if key != row.panel.metric else None)


def _section(title: str, id_: str, rows: Sequence[R], columns: Sequence[Column[R]]) -> Html | None:
    """None without rows. Columns that say nothing are left out."""
    if not rows:
        return None
    cells = [[cell(row) for _, cell in columns] for row in rows]
    told = [i for i in range(len(columns)) if any(line[i] != _EMPTY for line in cells)]
    same = [i for i in told if columns[i][0] in _FACTS and len({line[i] for line in cells}) == 1]
    kept = [i for i in told if i not in same]
    numbers = {i for i in kept if any(isinstance(line[i].value, float) for line in cells)}
    head = [tag("th", tag("button", columns[i][0], type="button"), scope="col", aria_sort="none") for i in kept]
    body = [[tag("td", line[i].text, data_v=line[i].value, class_="n" if i in numbers else None) for i in kept]
            for line in cells]  # fmt: skip
    facts = ", ".join(f"{columns[i][0]} {cells[0][i].text}" for i in same)
    return tag(
        "section",
        tag("h2", title),
        tag("p", f"In all rows: {facts}.", class_="caption") if facts else None,
        tag(
            "div",
            tag(
                "table", tag("thead", tag("tr", head)), tag("tbody", [tag("tr", line) for line in body]), class_="rows"
            ),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label=title,
        ),
        id=id_,
    )


def _difference(row: Quality) -> Cell:
    return _EMPTY if row.setting[0] == "full" else _with_bounds(points, row.difference, row.difference_interval)


def _word(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None, form: str, unit: str = "") -> Cell:
    return _EMPTY if value is None else Cell(f"{value:{form}}{unit}", float(value))


def _share(value: float | None) -> Cell:
    return _EMPTY if value is None else Cell(percent(value), value)


def _with_bounds(form: Callable[[float], str], value: float | None, bounds: Interval | None) -> Cell:
    if value is None:
        return _EMPTY
    text = form(value) + (f" [{form(bounds[0])}, {form(bounds[1])}]" if bounds else "").replace("%", "")
    return Cell(text, value)
