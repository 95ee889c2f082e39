"""Draws what cache policies save over the size of the cache."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ragkv.errors import InputError, MissingExtraError
from ragkv.store.policies import POLICIES


def check(path: Path) -> None:
    """Make sure that ``path`` can be drawn, before anything takes its time.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: a format matplotlib does not know, or a folder that is not there.
    """
    known = _formats()
    if path.suffix.lstrip(".") not in known or not path.absolute().parent.is_dir():
        endings = ", .".join(sorted(known))
        raise InputError(f"{path} cannot be drawn: name a file in a folder that exists, ending in .{endings}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the saved share over the cache's size, a panel per trace. ``result`` as ``cache_policy.compare`` has it.

    Raises:
        MissingExtraError, InputError: see ``check``.
    """
    check(path)
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        panels[row["trace"]][row["policy"]].append((100 * row["share"], 100 * row["saved"]))
    figure = Figure(figsize=(2.9 * len(panels) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (trace, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            style = "-o" if name in POLICIES else "k--" if name == "bound" else "k:"
            axis.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=3, linewidth=1.2)
        axis.set_title(trace, fontsize=10, loc="left")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.supxlabel("size of the cache, % of all distinct tokens", fontsize=10)
    figure.supylabel("prefill saved, %", fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _formats() -> set[str]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib: pip install 'ragkv[plots]'", extra="plots") from error
    return set(FigureCanvasAgg(Figure()).get_supported_filetypes())
