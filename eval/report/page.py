"""The page: sections that have something to show, style and script inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from ragkv.eval.palette import looks
from ragkv.eval.report import pareto, quality, serving, speed, tables
from ragkv.eval.report.files import Results
from ragkv.eval.report.html import Html, tag

_NAMES = {
    "pareto": "Quality against speed",
    "ttft": "Time to first token",
    "quality": "Answer quality",
    "serving": "Serving",
    "times": "Times",
    "scores": "Scores",
    "sources": "Sources",
}


def render(results: Results, title: str) -> str:
    """A whole HTML page of ``results``. It holds no address and lets the browser load none."""
    sections = {
        "pareto": pareto.section(results.speed, results.quality),
        "ttft": speed.section(results.speed),
        "quality": quality.section(results.quality),
        "serving": serving.section(results.serving),
        "times": tables.speed_table(results.speed),
        "scores": tables.quality_table(results.quality),
        "sources": tables.sources(results.sources),
    }
    shown = {name: section for name, section in sections.items() if section is not None}
    page = tag("html", _head(title), _body(results, title, shown), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(title: str) -> Html:
    # Even if markup from a file slipped through, no script but ours would run, and nothing could be sent anywhere.
    digest = base64.b64encode(hashlib.sha256(_part("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_part("page.css") + _colours())),
    )


def _colours() -> str:
    """What the figures' styles call by name, so that a page does not repeat it at every mark."""
    named = {f"look{number}": (one.light, one.dark) for number, one in enumerate(looks())}
    named |= {f"part-{part}": shades for part, shades in speed.PARTS.items()}
    values = "".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in named.items())
    return f":root{{{values}}}"


def _body(results: Results, title: str, sections: dict[str, Html]) -> Html:
    return tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            tag("button", "Light / dark", type="button", id="theme", hidden=True),
            tag("p", _summary(results)),
        ),
        tag("nav", tag("div", [tag("a", _NAMES[name], href=f"#{name}") for name in sections])),
        tag("main", list(sections.values())),
        tag("div", id="tip", role="tooltip", hidden=True),
        tag("script", Html(_part("page.js"))),
    )


def _summary(results: Results) -> str:
    rows: dict[str, Sequence[object]] = {
        "times": results.speed,
        "scores": results.quality,
        "serving runs": results.serving,
    }
    held = " and ".join(f"{len(own)} {name}" for name, own in rows.items() if own)
    dates = sorted({str(date) for file in results.sources if (date := file.facts.get("date"))})
    when = f", measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else ""
    count = len(results.sources)
    return f"{held} from {count} result file{'s' if count > 1 else ''}{when}."


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
