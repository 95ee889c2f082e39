"""Scatter charts as inline SVG: points with intervals, lines of a method's ratios, a Pareto front, a reference band.

Sizes are in units of the drawing, which the page scales. Colours follow the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ragkv.eval.palette import Look, looks
from ragkv.eval.report.html import Html, tag

WIDTH, HEIGHT = 480, 310
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 44
_LOG_FROM = 5.0  # a range this many times its beginning is drawn on a logarithmic axis
_LETTER, _LINE = 6.1, 13.0  # of a label
_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A mark of a chart: ``low`` and ``high`` are its interval on the y axis; ``tip`` is what a pointer shows. A hidden
    one is only where its line passes."""

    x: float
    y: float
    low: float
    high: float
    line: str
    look: Look
    label: str
    tip: str
    front: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Band:
    """A horizontal line that points are held against, with its interval."""

    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Values to units of the drawing; ``start`` may be the larger one."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    @property
    def ticks(self) -> list[float]:
        if not self.log:
            return _even_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
        every = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in every if self.low <= tick <= self.high]


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def x_axis(values: Sequence[float]) -> Axis:
    """Over ``values`` with a little room: logarithmic where they range far, else from zero."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOG_FROM:
        return Axis(low / 1.35, high * 1.35, LEFT, WIDTH - RIGHT, log=True)
    return Axis(0.0, 1.16 * high or 1.0, LEFT, WIDTH - RIGHT)


def y_axis(values: Sequence[float]) -> Axis:
    """Over ``values``, shares in percent, with a little room; at least five points high."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (5.0 - (high - low)) / 2, 0.0)
    return Axis(max(low - room, -2.0), min(high + room, 102.0), HEIGHT - BOTTOM, TOP)


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    band: Band | None = None,
    front: bool = False,
) -> Html:
    """The chart. ``front`` joins the points that are on it, from left to right, in steps."""
    x = x_axis([point.x for point in points])
    y = y_axis([v for p in points for v in (p.low, p.high)] + ([band.low, band.high] if band else []))
    marks = sorted((point for point in points if not point.hidden), key=lambda point: point.front)
    return tag(
        "svg",
        grid(x, y, x_text, x_title, y_title),
        _band(band, x, y) if band else None,
        _front([p for p in points if p.front], x, y) if front else None,
        [_line(line, x, y) for line in _lines(points)],
        [_interval(point, x, y) for point in marks],
        [_mark(point, x, y) for point in marks],
        _labels(marks, x, y),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_label=title,
        class_="chart",
    )


def grid(x: Axis, y: Axis, x_text: Callable[[float], str], x_title: str, y_title: str) -> list[Html]:
    """Lines, ticks and titles of a chart."""
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    across = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(t), y2=y(t), class_="grid") for t in y.ticks]
    ups = [tag("line", x1=x(t), x2=x(t), y1=bottom, y2=bottom + 4, class_="axis") for t in x.ticks]
    return [
        *across,
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"),
        *ups,
        *(tag("text", f"{t:g}", x=LEFT - 7, y=y(t) + 4, text_anchor="end", class_="tick") for t in y.ticks),
        *(tag("text", x_text(t), x=x(t), y=bottom + 18, text_anchor="middle", class_="tick") for t in x.ticks),
        tag("text", x_title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle", class_="title"),
        tag("text", y_title, transform=f"translate(12 {middle}) rotate(-90)", text_anchor="middle", class_="title"),
    ]


def _band(band: Band, x: Axis, y: Axis) -> Html:
    top, bottom = y(band.high), y(band.low)
    return tag(
        "g",
        tag("rect", x=LEFT, y=top, width=WIDTH - RIGHT - LEFT, height=round(bottom - top, 1), class_="band"),
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(band.y), y2=y(band.y), class_="reference"),
        role="img",
        aria_label=band.label,
        data_tip=True,
    )


def _front(points: Sequence[Point], x: Axis, y: Axis) -> Html | None:
    """Nothing is both sooner and better than what lies on the steps."""
    ordered = sorted(points, key=lambda point: point.x)
    if not ordered:
        return None
    path = f"M{x(ordered[0].x)} {HEIGHT - BOTTOM}"
    path += "".join(f"V{y(p.y)}H{x(after.x)}" for p, after in pairwise(ordered))
    return tag("path", d=path + f"V{y(ordered[-1].y)}H{WIDTH - RIGHT}", class_="front")


def _lines(points: Sequence[Point]) -> Iterator[list[Point]]:
    for name in dict.fromkeys(point.line for point in points):
        own = [point for point in points if point.line == name]
        if len(own) > 1:
            yield sorted(own, key=lambda point: point.x)


def _line(points: Sequence[Point], x: Axis, y: Axis) -> Html:
    path = " ".join(f"{x(p.x)},{y(p.y)}" for p in points)
    return tag("polyline", points=path, class_="line", style=colour(points[0].look))


def _interval(point: Point, x: Axis, y: Axis) -> Html | None:
    if point.high <= point.low:
        return None
    across, top, bottom = x(point.x), y(point.high), y(point.low)
    path = f"M{across} {top}V{bottom}M{across - 3} {top}h6M{across - 3} {bottom}h6"
    return tag("path", d=path, class_="whisker", style=colour(point.look))


def _mark(point: Point, x: Axis, y: Axis) -> Html:
    return tag(
        "g",
        marker(point.look.marker, x(point.x), y(point.y), 5.5),
        class_="point on-front" if point.front else "point",
        style=colour(point.look),
        tabindex=0,
        role="img",
        aria_label=point.tip,
        data_tip=True,
    )


def _labels(points: Sequence[Point], x: Axis, y: Axis) -> list[Html]:
    """Names beside the points, those of the front first, where there is room; the pointer tells the others."""
    taken: list[_Box] = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    labels = []
    for point in sorted(filter(lambda p: p.label, points), key=lambda point: not point.front):
        across, up, width = x(point.x), y(point.y), _LETTER * len(point.label)
        beside = [("start", across + 10, up + 4), ("end", across - 10 - width, up + 4)]
        above = [("start", across + 7, up - 8), ("end", across - 7 - width, up - 8)]
        below = [("start", across + 7, up + 17), ("end", across - 7 - width, up + 17)]
        # A front runs on to the right of its points.
        for anchor, left, base in above + beside + below if point.front else beside + above + below:
            box = (left, base - _LINE + 3, left + width, base + 2)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                at = left if anchor == "start" else left + width
                weight = "label strong" if point.front else "label"
                labels.append(tag("text", point.label, x=round(at, 1), y=base, text_anchor=anchor, class_=weight))
                break
    return labels


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def colour(look: Look) -> str:
    """A style that makes ``currentColor`` the look's, in either theme."""
    return f"color:var(--look{looks().index(look)})"


def marker(shape: str, x: float, y: float, size: float) -> Html:
    """A mark of matplotlib's name, of the radius ``size``."""
    if shape == "o":
        return tag("circle", cx=x, cy=y, r=size)
    path = {
        "s": _polygon(x, y, 1.2 * size, 4, 45),
        "D": _polygon(x, y, 1.25 * size, 4, 0),
        "^": _polygon(x, y, 1.3 * size, 3, -90),
        "v": _polygon(x, y, 1.3 * size, 3, 90),
        "p": _polygon(x, y, 1.2 * size, 5, -90),
        "*": _star(x, y, 1.6 * size, 5),
        "P": _star(x, y, 1.5 * size, 4),
        "X": _star(x, y, 1.5 * size, 4, 45),
    }[shape]
    return tag("path", d=path)


def _polygon(x: float, y: float, radius: float, corners: int, turn: float) -> str:
    return _closed(x, y, [radius] * corners, turn)


def _star(x: float, y: float, radius: float, rays: int, turn: float = -90) -> str:
    return _closed(x, y, [radius, 0.45 * radius] * rays, turn)


def _closed(x: float, y: float, radii: Sequence[float], turn: float) -> str:
    angles = [math.radians(turn + 360 * i / len(radii)) for i in range(len(radii))]
    corners = [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    return "M" + "L".join(f"{round(a, 1):g} {round(b, 1):g}" for a, b in corners) + "Z"
