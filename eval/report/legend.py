"""Keys to a chart's marks and colours."""

from __future__ import annotations

from collections.abc import Iterable

from ragkv.eval.palette import in_turn, look
from ragkv.eval.report.charts import colour, marker
from ragkv.eval.report.html import Html, tag


def legend(methods: Iterable[str], *, full: bool, front: bool = False) -> Html:
    """The methods' marks, and the lines of ``full`` prefill and of the ``front`` where they are drawn."""
    return tag(
        "ul",
        [_key(name, marker(look(name).marker, 8, 8, 5), style=colour(look(name))) for name in in_turn(set(methods))],
        _key("Pareto front", tag("path", d="M0 12H7V4H16", class_="front")) if front else None,
        _key("full prefill", tag("path", d="M0 8H16", class_="reference")) if full else None,
        class_="legend",
    )


def _key(name: str, mark: Html, style: str | None = None) -> Html:
    return tag("li", tag("svg", mark, viewBox="0 0 16 16", style=style, aria_hidden="true"), name)


def swatches(colours: Iterable[tuple[str, str]]) -> Html:
    """Names with a patch of their colour, a CSS value."""
    return tag(
        "ul",
        [tag("li", tag("i", style=f"background:{value}"), name) for name, value in colours],
        class_="legend",
    )
