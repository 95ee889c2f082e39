"""Time to first token: a bar for each setting with its parts, the floor, and full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ragkv.eval.report import words
from ragkv.eval.report.html import Html, ms, setting, tag
from ragkv.eval.report.legend import swatches
from ragkv.eval.report.rows import Place, Speed

# A request's walk: what comes first stands first. Colours of Okabe and Ito on white and on black.
PARTS = {
    "retrieve": ("#8A6D00", "#D9C24A"),
    "queue": ("#999999", "#8C8C8C"),
    "plan": ("#CC79A7", "#E39BC3"),
    "lookup": ("#7A4FBF", "#B79CED"),
    "load": ("#56B4E9", "#7CC7F0"),
    "select": ("#009E73", "#3CC79A"),
    "recompute": ("#0072B2", "#3F8FD2"),
    "first_token": ("#D55E00", "#F08A4B"),
    "other": ("#5B6770", "#B4BEC7"),
}
_Group = tuple[str, str]


def section(rows: Sequence[Speed]) -> Html | None:
    """None without rows."""
    if not rows:
        return None
    groups: dict[_Group, list[Speed]] = {}
    for row in rows:
        groups.setdefault((words.machine(row.place), words.load(row.place)), []).append(row)
    held = {name if name in PARTS else "other" for row in rows for name in row.parts}
    return tag(
        "section",
        tag("h2", "Time to first token"),
        tag(
            "p",
            "Medians. A bar's parts are those of the run nearest the median; loading overlaps computing, so its part "
            "is only what computing waited for. The floor is the least time this machine's disk, link, memory and "
            "matrix rates allow.",
        ),
        tag(
            "div",
            tag("label", tag("input", type="radio", name="bars", checked=True, class_="by-ms"), "times"),
            tag("label", tag("input", type="radio", name="bars", class_="by-near"), "without full prefill"),
            tag("label", tag("input", type="radio", name="bars", class_="by-share"), "where the time goes"),
            class_="toggle",
        ),
        swatches((_name(name), _colour(name)) for name in PARTS if name in held),
        tag(
            "ul",
            tag("li", tag("i", class_="key-floor"), "floor"),
            tag("li", tag("i", class_="key-full"), "full prefill, the faster of the library's and ragkv's"),
            class_="legend by-ms-only",
        ),
        [_group(*group, own) for group, own in groups.items()],
        id="ttft",
    )


def _group(machine: str, load: str, rows: Sequence[Speed]) -> Html:
    places = list(dict.fromkeys(row.place for row in rows))
    scales = _Scales(
        longest=max(max(row.ttft, row.full, row.floor or 0.0) for row in rows),
        blended=max((row.ttft for row in rows if row.setting[0] != "full"), default=1.0),
    )
    return tag(
        "div",
        tag("h3", machine, tag("small", load)),
        tag("div", [_place(place, [r for r in rows if r.place == place], scales) for place in places], class_="places"),
        class_="group",
    )


class _Scales(NamedTuple):
    """What a whole track stands for, in ms: with full prefill, and without it."""

    longest: float
    blended: float

    def style(self, spent: float, **more: float) -> str:
        """CSS variables of ``spent``, in percent of a track."""
        shares = {"ms": spent / self.longest, "near": spent / self.blended, **more}
        return ";".join(f"--{name}:{100 * share:.3f}%" for name, share in shares.items())


def _place(place: Place, rows: Sequence[Speed], scales: _Scales) -> Html:
    heads = ("", "", "TTFT", "sooner", "× floor")
    return tag(
        "div",
        tag("h4", words.sentence(words.tier(place))),
        tag(
            "div",
            tag("div", [tag("span", text) for text in heads], class_="bar bar-head", aria_hidden="true"),
            [_bar(row, scales) for row in rows],
            class_="bars",
        ),
        class_="place",
    )


def _bar(row: Speed, scales: _Scales) -> Html:
    # Parts are of one run, the bar's length is the median's.
    total = sum(row.parts.values())
    order = sorted(row.parts, key=lambda part: [*PARTS, part].index(part))
    segments = [_segment(part, row, total, scales) for part in order if row.parts[part] > 0]
    whole = tag("i", class_="part", style=scales.style(row.ttft, share=1.0) + f";background:{_colour('other')}")
    return tag(
        "div",
        tag("span", setting(*row.setting), class_="bar-name"),
        tag(
            "span",
            segments or whole,
            tag("i", class_="floor", style=scales.style(row.floor)) if row.floor else None,
            tag("i", class_="full", style=scales.style(row.full)),
            class_="track",
        ),
        tag("b", ms(row.ttft)),
        tag("span", f"{row.speedup:.1f}×"),
        tag("span", f"{row.ttft / row.floor:.1f}×" if row.floor else "", class_="over"),
        class_="bar of-full" if row.setting[0] == "full" else "bar",
    )


def _segment(part: str, row: Speed, total: float, scales: _Scales) -> Html:
    share = row.parts[part] / total
    tip = f"{setting(*row.setting)}\n{_name(part)}: {ms(row.parts[part])}, {share:.1%} of its time"
    return tag(
        "i",
        class_="part",
        style=scales.style(share * row.ttft, share=share) + f";background:{_colour(part)}",
        tabindex=0 if share > 0.02 else None,
        role="img",
        aria_label=tip,
        data_tip=True,
    )


def _name(part: str) -> str:
    return part.replace("_", " ")


def _colour(part: str) -> str:
    return f"var(--part-{part if part in PARTS else 'other'})"
