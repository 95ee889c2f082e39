"""Quality against time to first token: rows of both kinds joined by method and ratio, and the front among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragkv.eval.palette import look
from ragkv.eval.report import words
from ragkv.eval.report.charts import Band, Point, colour, scatter
from ragkv.eval.report.html import Html, ms, percent, points, setting, tag
from ragkv.eval.report.legend import legend
from ragkv.eval.report.rows import Panel, Place, Quality, Speed

_OWN = "own"  # stands for a tier where the run that gave the answers took the times, too


@dataclass(frozen=True)
class Pair:
    """A setting's speed and quality."""

    speed: Speed
    quality: Quality

    @property
    def ms(self) -> float:
        """Of full prefill, the faster one: ragkv's or the library's."""
        return self.speed.full if self.speed.setting[0] == "full" else self.speed.ttft


def pairs_of(speed: Sequence[Speed], quality: Sequence[Quality], place: Place) -> list[Pair]:
    """Settings that both know, in the order of ``speed``; quality of the place's codec, or of raw KV if there is
    none."""
    codecs = {row.codec for row in quality}
    codec = place.codec if place.codec in codecs else "raw" if "raw" in codecs else next(iter(sorted(codecs)), "")
    known = {row.setting: row for row in quality if row.codec == codec or row.setting[0] == "full"}
    own = [row for row in speed if row.place == place]
    return [Pair(row, known[row.setting]) for row in own if row.setting in known]


def front_of(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that no other beats in both, the soonest first. Of equals the first stays."""
    front: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (pair.ms, -pair.quality.score)):
        if not front or pair.quality.score > front[-1].quality.score:
            front.append(pair)
    return front


def own_times(quality: Sequence[Quality]) -> list[Speed]:
    """Speeds of the very run that gave the answers, where it asked every question from scratch."""
    full = next((row.ttft for row in quality if row.setting[0] == "full"), None)
    return [
        Speed(
            place=Place(row.panel.model, "", row.panel.tokens, 1, _OWN, row.codec),
            setting=row.setting,
            share=row.share,
            ttft=row.ttft,
            full=full,
        )
        for row in quality
        if row.ttft and full
    ]


def section(speed: Sequence[Speed], quality: Sequence[Quality]) -> Html | None:
    """None where no speed and quality have settings in common."""
    panels = list(dict.fromkeys(row.panel for row in quality))
    places = list(dict.fromkeys(row.place for row in speed))
    speeds = {str(q): _place_name(places, place) for q, place in enumerate(places)}
    figures: dict[tuple[str, str], list[Pair]] = {}
    for p, panel in enumerate(panels):
        rows = [row for row in quality if row.panel == panel]
        for q, place in enumerate(places):
            figures[str(q), str(p)] = pairs_of(speed, rows, place)
        if own := own_times(rows):
            figures[_OWN, str(p)] = pairs_of(own, rows, own[0].place)
            speeds[_OWN] = "timed with the answers"
    figures = {chosen: pairs for chosen, pairs in figures.items() if len(pairs) > 1}
    if not figures:
        return None
    best = max(figures, key=lambda chosen: _weight(figures[chosen]))
    qualities = {str(p): _panel_name(panels, panel) for p, panel in enumerate(panels)}
    return tag(
        "section",
        tag("h2", "Quality against speed"),
        tag("div", _select("Speed", speeds, best[0]), _select("Quality", qualities, best[1]), class_="pickers"),
        [_pick(chosen, pairs, shown=chosen == best) for chosen, pairs in figures.items()],
        tag("p", "These two have no method and ratio in common.", class_="no-pick", hidden=True),
        id="pareto",
    )


def _weight(pairs: Sequence[Pair]) -> tuple[bool, int, bool, int]:
    """What is shown first: times of the same run; then the most settings; then what ragkv does when nothing is asked
    for, and the most questions."""
    panel = pairs[0].quality.panel
    return pairs[0].speed.place.tier == _OWN, len(pairs), panel.policy == "document", panel.questions


def _pick(chosen: tuple[str, str], pairs: Sequence[Pair], *, shown: bool) -> Html:
    return tag("div", _figure(pairs), class_="pick", data_speed=chosen[0], data_quality=chosen[1], hidden=not shown)


def _place_name(places: Sequence[Place], place: Place) -> str:
    """As short as tells the places apart."""
    several = len({words.machine(one) for one in places}) > 1
    return ", ".join([*([words.machine(place)] if several else []), words.load(place), words.tier(place)])


def _panel_name(panels: Sequence[Panel], panel: Panel) -> str:
    several = len({words.data(one) for one in panels}) > 1
    parts = [words.data(panel)] if several else []
    return ", ".join([*parts, words.conditions(panel), f"{panel.questions:,} questions"])


def _select(label: str, options: dict[str, str], chosen: str) -> Html:
    choices = [tag("option", text, value=value, selected=value == chosen) for value, text in options.items()]
    picker = tag("select", choices, data_pick=label.lower(), disabled=len(options) == 1, autocomplete="off")
    return tag("label", tag("span", label), picker)


def _figure(pairs: Sequence[Pair]) -> Html:
    place, panel = pairs[0].speed.place, pairs[0].quality.panel
    front = front_of(pairs)
    full = next((pair for pair in pairs if pair.speed.setting[0] == "full"), None)
    metric = words.metric(panel)
    chart = scatter(
        [_point(pair, pair in front, metric) for pair in pairs],
        title=f"{metric} against time to first token",
        x_title="time to first token",
        y_title=f"{metric}, %",
        x_text=_axis_ms,
        band=_band(full, metric) if full else None,
        front=True,
    )
    key = legend([pair.speed.setting[0] for pair in pairs], full=full is not None, front=True)
    left = tag("div", tag("figure", chart, key), _warning(pairs), _caption(place, panel))
    return tag("div", left, _tiles(front), class_="beside")


def _axis_ms(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _point(pair: Pair, on_front: bool, metric: str) -> Point:
    quality, name = pair.quality, setting(*pair.speed.setting)
    low, high = quality.interval or (quality.score, quality.score)
    tip = [
        name,
        f"{ms(pair.ms)} to first token, {pair.speed.full / pair.ms:.1f}× full prefill",
        f"{metric} {percent(quality.score)}" + (f" [{percent(low)}, {percent(high)}]" if quality.interval else ""),
    ]
    if quality.difference is not None and pair.speed.setting[0] != "full":
        tip.append(f"{points(quality.difference)} points to full prefill")
    tip.append(f"{percent(quality.share)} of the context recomputed")
    if on_front:
        tip.append("on the front: nothing here is both sooner and better")
    return Point(
        x=pair.ms,
        y=100 * quality.score,
        low=100 * low,
        high=100 * high,
        line=pair.speed.setting[0],
        look=look(pair.speed.setting[0]),
        label=name,
        tip="\n".join(tip),
        front=on_front,
    )


def _band(full: Pair, metric: str) -> Band:
    score = full.quality.score
    low, high = full.quality.interval or (score, score)
    return Band(100 * score, 100 * low, 100 * high, f"full prefill: {metric} {percent(score)}")


def _tiles(front: Sequence[Pair]) -> Html:
    """The front in numbers, the soonest first: what each step costs and gives."""
    return tag("div", tag("h3", "On the front"), [_tile(pair) for pair in front], class_="tiles")


def _tile(pair: Pair) -> Html:
    method = pair.speed.setting[0]
    difference = pair.quality.difference
    if method == "full" or difference is None:
        small = percent(pair.quality.score)
    else:
        bounds = pair.quality.difference_interval
        interval = f" [{points(bounds[0])}, {points(bounds[1])}]" if bounds else ""
        small = f"{points(difference)} points{interval}"
    return tag(
        "div",
        tag("span", setting(*pair.speed.setting), class_="name"),
        tag("strong", f"{pair.speed.full / pair.ms:.1f}×", tag("small", "sooner") if method != "full" else None),
        tag("span", f"{ms(pair.ms)} to first token", class_="small"),
        tag("span", small, class_="small"),
        class_="tile",
        style=colour(look(method)),
    )


def _caption(place: Place, panel: Panel) -> Html:
    return tag(
        "p",
        "Further left is sooner, higher is better; the steps join what nothing else beats in both. Whiskers and band "
        "are 95% intervals. ",
        tag("b", "Speed: "),
        "medians over these very questions, each asked from scratch. "
        if place.tier == _OWN
        else f"{words.machine(place)}, {words.load(place)}, {words.tier(place)}. ",
        tag("b", "Quality: "),
        f"{words.data(panel)}, {words.conditions(panel)}, {panel.questions:,} questions.",
        class_="caption",
    )


def _warning(pairs: Sequence[Pair]) -> Html | None:
    """What a reader must know of where the two halves of a point come from."""
    place, panel = pairs[0].speed.place, pairs[0].quality.panel
    notes = []
    if place.model != panel.model:
        notes.append(
            f"Two models: the quality of {panel.model} is joined with the speed of {place.model}, by method and ratio. "
            "It shows what each method gives up and wins, not what one of the two would do."
        )
    codecs = {pair.quality.codec for pair in pairs if pair.speed.setting[0] != "full"}
    if codecs and codecs != {place.codec}:
        notes.append(f"Quality was measured with {', '.join(sorted(codecs))} KV, speed with {place.codec}.")
    return tag("p", " ".join(notes), class_="note") if notes else None
