"""Tables in the docs, made of result files: ``python -m ragkv.eval.tables README.md docs/*.md`` writes them anew.

In a page a table stands between ``<!-- quality FILE field=value … -->``, or with ``ttft``, ``decode``, ``serving``,
``streams``, ``tenants`` or ``demo``, and ``<!-- end -->``; rows with other values are left out. Files are looked for
from the folder one works in.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ragkv.methods import parameters
from ragkv.terminal import demo_bars

Row = dict[str, Any]
# What a quality table has a column for where its rows differ in it.
_TOLD_APART = ("codec", "check_layer")


def rendered(page: str, root: Path = Path()) -> str:
    """``page`` with its tables made anew from the result files under ``root``."""

    def table(found: re.Match[str]) -> str:
        head, kind, file, wanted, end = found.groups()
        fields = dict(part.split("=", 1) for part in wanted.split())
        result = json.loads((root / file).read_text(encoding="utf-8"))
        rows = result.get("rows", [result])
        kept = [row for row in rows if all(str(row[name]) == value for name, value in fields.items())]
        return head + "\n" + "\n".join(_KINDS[kind](kept)) + "\n\n" + end

    return _TABLE.sub(table, page)


def _quality(rows: Sequence[Row]) -> list[str]:
    kinds = list(rows[0]["by_kind"])
    told = [name for name in _TOLD_APART if len({row.get(name) for row in rows}) > 1]
    heads = ["method", *(name.replace("_", " ") for name in told), "recomputed", "exact match", "to full", *kinds]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        interval = _percent(row["exact_match_interval"])
        to_full = "" if row["method"] == "full" else f"{100 * row['difference_to_full']:+.1f}"
        if to_full:
            to_full += f" {_percent(row['difference_interval'])}"
        cells = [
            _method(row),
            *(str(row[name]) for name in told),
            f"{row['recomputed_share']:.0%}",
            f"{100 * row['exact_match']:.1f} {interval}",
            to_full,
            *(f"{100 * row['by_kind'][kind]:.0f}" for kind in kinds),
        ]
        lines.append(_line(cells))
    return lines


def _ttft(rows: Sequence[Row]) -> list[str]:
    contexts = sorted({row["context_tokens"] for row in rows})
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        place = ("", "") if row["method"] == "full" else (row["tier"], row["codec"])
        text = f"{row['ttft_ms']:.0f} ms"
        if row["method"] == "full":
            text += f", {row['full_prefill_of_matrix_rate']:.0%} of the matrix rate"
        else:
            way = f" ({row['chose']})" if row.get("chose") not in (None, "blend") else ""
            text += f"{way}, **{row['speedup']:.1f}×**, {row['over_floor']:.1f}"
        # A full prefill is measured again for every tier: the first will do.
        cells.setdefault((*place, _method(row)), {}).setdefault(row["context_tokens"], text)
    lines = [
        _line(["from", "codec", "method", *(f"{n:,}" for n in contexts)]),
        "|" + "---|" * (3 + len(contexts)),
    ]
    return lines + [_line([*key, *(by.get(n, "") for n in contexts)]) for key, by in cells.items()]


def _decode(rows: Sequence[Row]) -> list[str]:
    contexts = sorted({row["context_tokens"] for row in rows})
    cells: dict[int, dict[int, str]] = {}
    for row in rows:
        text = f"{row['itl_ms']:.2f} ms, floor {row['floor_ms']:.2f}: **{row['over_floor']:.2f}×**"
        cells.setdefault(row["batch"], {})[row["context_tokens"]] = text
    lines = [_line(["batch", *(f"{n:,}" for n in contexts)]), "|" + "---|" * (1 + len(contexts))]
    return lines + [_line([str(batch), *(by.get(n, "") for n in contexts)]) for batch, by in cells.items()]


def _serving(rows: Sequence[Row]) -> list[str]:
    """Times in ms."""
    heads = ["preemption", "TTFT P50", "P99", "P99.9", "TBT P50", "P99", "P99.9", "tokens/s", "preempted", "moved"]
    lines = [_line([*heads, "scheduling"]), "|" + "---|" * (len(heads) + 1)]
    for row in rows:
        tails = [row[f"{share}_{what}_ms"] for what in ("ttft", "tbt") for share in ("p50", "p99", "p999")]
        cells = [
            f"`{row['preemption']}`",
            *(f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" for ms in tails),
            f"{row['throughput_tok_s']:,.0f}",
            f"{row['preemption_rate']:.2f}",
            f"{row['swap_bytes'] / 1e9:.0f} GB",
            f"{row['scheduler_share']:.2%}",
        ]
        lines.append(_line(cells))
    return lines


def _streams(rows: Sequence[Row]) -> list[str]:
    """Runs of as many requests at once as ``max_running``; times in ms."""
    fewest = min(rows, key=lambda row: int(row["max_running"]))
    lines = [_line(["at once", "tokens/s", "", "TBT P50", "P99", "a step"]), "|" + "---|" * 6]
    for row in sorted(rows, key=lambda row: int(row["max_running"])):
        cells = [
            str(row["max_running"]),
            f"{row['throughput_tok_s']:,.0f}",
            f"**{row['throughput_tok_s'] / fewest['throughput_tok_s']:.1f}×**",
            *(f"{row[name]:.1f}" for name in ("p50_tbt_ms", "p99_tbt_ms", "step_ms")),
        ]
        lines.append(_line(cells))
    return lines


def _tenants(rows: Sequence[Row]) -> list[str]:
    """Times in seconds."""
    lines = [_line(["load", "Jain", "gap", "tenant", "requests", "TTFT P50", "P99"]), "|" + "---|" * 7]
    for row in rows:
        head = [f"`{row['load']}`", f"{row['jain']:.3f}", f"{row['service_gap']:,.0f}"]
        for name, own in row["tenants"].items():
            times = [f"{own[f'{p}_ttft_ms'] / 1000:.1f}" for p in ("p50", "p99")]
            lines.append(_line([*head, name, str(own["requests"]), *times]))
            head = ["", "", ""]
    return lines


def _demo(rows: Sequence[Row]) -> list[str]:
    """What it prints at its end."""
    return ["```", *(line for row in rows for line in demo_bars(row["summary"])), "```"]


_KINDS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "quality": _quality,
    "ttft": _ttft,
    "decode": _decode,
    "serving": _serving,
    "streams": _streams,
    "tenants": _tenants,
    "demo": _demo,
}
_TABLE = re.compile(rf"(<!-- ({'|'.join(_KINDS)}) (\S+)((?: \w+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def _method(row: Row) -> str:
    name = f"`{row['method']}`"
    return f"{name} {row['ratio']:.0%}" if "ratio" in parameters(row["method"]) else name


def _percent(interval: Sequence[float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
