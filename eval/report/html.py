"""Markup built so that nothing from outside can become markup: whatever is not :class:`Html` is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_EMPTY = frozenset({"br", "input", "meta", "circle", "line", "path", "polyline", "rect"})


class Html(str):
    """Markup that is safe to stand in a page as it is."""

    __slots__ = ()


Child = str | float | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. ``class_`` is class, ``stroke_width`` is stroke-width; an attribute that is None or False is left
    out. Children that are not :class:`Html` are text; None is nothing, a list is its elements."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _EMPTY:
        return Html(f"<{name}{given}>" if name in ("br", "input", "meta") else f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """All of them, one after the other."""
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return escape(str(child))
    return joined(child)


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return f" {name}" if value else ""
    return f' {name}="{escape(f"{value:g}" if isinstance(value, float) else str(value))}"'


def ms(value: float) -> str:
    """Milliseconds for people, three figures or so."""
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    """A difference of shares, in points, with a real minus."""
    return f"{100 * difference:+.1f}".replace("-", "−").replace("−0.0", "±0.0").replace("+0.0", "±0.0")


def setting(method: str, ratio: float) -> str:
    """A method with its ratio, where it has one."""
    return f"{method} {ratio:.0%}" if 0 < ratio < 1 else method
