"""What people see on a terminal: progress, answers, tables."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ragkv.config import Settings
from ragkv.types import Answer, IngestEstimate, IngestReport, RejectedDocument

STAGES = {
    "load": "loading the model",
    "split": "splitting documents",
    "index": "indexing chunks",
    "encode": "computing chunk KV",
    "store": "storing chunk KV (Ctrl-C: leave it)",
    "ask": "asking questions",
    "write": "writing questions",
    "pilot": "trying all settings",
    "narrow": "finding the cheapest",
}
Say = Callable[[str, int, int], None]
_A_LINE_EVERY_S = 5.0


@contextmanager
def progress(console: Console, *, quiet: bool = False) -> Iterator[Say]:
    """A bar per stage; call it with stage, done, total from any thread. Where no bar can move, as in a log, lines do.

    What stands behind a stage's ``": "`` says what is being done of it, and may change from call to call.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()
    with Progress(*columns, console=console) as bars:

        def say(stage: str, done: int, total: int) -> None:
            with lock:
                name, shown = stage.partition(": ")[0], STAGES.get(stage, stage)
                if name not in tasks:
                    tasks[name] = bars.add_task(shown, total=total)
                bars.update(tasks[name], description=shown, completed=done, total=total)

        yield say


def _lines(console: Console) -> Say:
    """A line when a stage begins, when it is done, and from time to time between."""
    began = time.monotonic()
    told: dict[str, tuple[float, bool]] = {}
    lock = threading.Lock()

    def say(stage: str, done: int, total: int) -> None:
        now, over, name = time.monotonic(), done >= total, stage.partition(": ")[0]
        with lock:
            at, was_over = told.get(name, (0.0, None))
            if over == was_over and (over or now - at < _A_LINE_EVERY_S):
                return
            told[name] = now, over
            line = f"{done}/{total} after {now - began:.0f} s, {STAGES.get(stage, stage)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return say


def show_answer(console: Console, answer: Answer) -> None:
    """Sources, where each chunk's KV came from, where the time went. The text was streamed already."""
    if answer.chunks:
        table = Table("rank", "source", "tokens", "KV from", "recomputed", "note", box=None, header_style="dim")
        for chunk in answer.chunks:
            table.add_row(
                str(chunk.rank),
                Text(f"{chunk.chunk_id}  {chunk.title or ''}"[:60]),
                str(chunk.tokens),
                chunk.kv,
                str(chunk.repaired_tokens),
                Text(chunk.why or "", style="dim"),
            )
        console.print()
        console.print(table)
    show_footer(console, answer)
    timing = answer.timing
    parts = ("retrieve", "plan", "queue", "lookup", "load", "select", "recompute", "first_token")
    spent = "  ".join(f"{part} {getattr(timing, part + '_ms'):.1f}" for part in parts)
    console.print(f"[dim]ms: {spent}[/]", highlight=False)


def show_footer(console: Console, answer: Answer) -> None:
    usage = answer.usage
    for warning in answer.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)
    console.print(
        f"[dim]first token after {answer.timing.ttft_ms:.0f} ms · {answer.method}, "
        f"{answer.recomputed_share:.1%} of {usage.context_tokens} context tokens recomputed · "
        f"{usage.completion_tokens} tokens, {answer.finish_reason}[/]",
        highlight=False,
    )


def show_estimate(console: Console, estimate: IngestEstimate) -> None:
    console.print(
        f"{estimate.documents} documents, {estimate.chunks} chunks, {estimate.tokens:,} tokens: their KV takes "
        f"{size(estimate.kv_bytes)}, {size(estimate.new_kv_bytes)} of it still to be computed "
        f"({estimate.encode_tokens:,} tokens to prefill)",
        highlight=False,
    )
    if estimate.kv_bytes > estimate.capacity_bytes:
        console.print(
            f"[yellow]note:[/] that is more than the store's {size(estimate.capacity_bytes)}: the least used will "
            "be evicted and computed again; raise store_bytes to keep all",
            highlight=False,
        )


def show_rejected(console: Console, rejected: Iterable[RejectedDocument]) -> None:
    for one in rejected:
        console.print(Text(f"rejected: {one.message}", style="yellow"))


def show_ingest(console: Console, report: IngestReport, rejected: list[RejectedDocument]) -> None:
    """``rejected`` are those that were not even given to the engine."""
    console.print(
        f"{report.collection}: {report.added} documents added, {report.replaced} replaced, {report.unchanged} "
        f"unchanged; {report.chunks} chunks: {report.encoded} computed, {report.reused} already stored, "
        f"{report.deferred} left for first use; {size(report.kv_bytes_written)} written in {report.seconds:.1f} s",
        highlight=False,
    )
    show_rejected(console, [*rejected, *report.rejected])
    for warning in report.warnings:
        console.print(Text(f"note: {warning}", style="yellow"))


def show_rows(console: Console, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """A line for each; what it has besides ``columns`` is left out."""
    table = Table(*columns, box=None, header_style="dim")
    for row in rows:
        table.add_row(*(Text("" if row[column] is None else str(row[column])) for column in columns))
    console.print(table)


def show_fields(console: Console, fields: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in _flat(fields):
        shown = f"{value:,} ({size(value)})" if "bytes" in name and isinstance(value, int) else str(value)
        table.add_row(name, Text(shown))
    console.print(table)


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {inner}", one) for inner, one in value.items())
        else:
            yield name, value


def show_demo(console: Console, result: dict[str, Any]) -> None:
    ways = list(result["summary"])
    table = Table("kind", "question", "gold", *ways, title=f"ragkv demo · model {result['model']}", show_lines=True)
    for one in result["questions"]:
        table.add_row(one["kind"], one["question"], one["gold"], *(_cell(one["runs"][way]) for way in ways))
    console.print(table)
    sources = Table("question", "its two best sources", box=None, header_style="dim")
    for one in result["questions"]:
        sources.add_row(one["question"], ", ".join(one["runs"]["blend"]["sources"][:2]))
    console.print(sources)
    console.print()
    for line in demo_bars(result["summary"]):
        console.print(line, highlight=False)


def _cell(run: dict[str, Any]) -> Text:
    mark = ("✓ ", "green") if run["correct"] else ("✗ ", "red")
    detail = f"\n{run['ttft_ms']:.0f} ms, {run['recomputed_share']:.0%} recomputed"
    return Text.assemble(mark, run["answer"], (detail, "dim"))


def demo_bars(summary: dict[str, Any]) -> Iterator[str]:
    """What a demo ends with, line by line."""
    slowest = max(way["median_ttft_ms"] for way in summary.values())
    for name, way in summary.items():
        bar = "█" * max(1, round(30 * way["median_ttft_ms"] / slowest))
        yield f"{name:>6} {bar:<30} {way['median_ttft_ms']:5.0f} ms to first token, {way['accuracy']:.0%} right"
    ratio = summary["full"]["median_ttft_ms"] / summary["blend"]["median_ttft_ms"]
    yield f"\nblend starts answering {ratio:.1f}× sooner than full prefill"


def size(count: float) -> str:
    """Bytes for people: ``134.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def settings_table(settings: type[Settings]) -> str:
    """All settings as a Markdown table, for the docs."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in settings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = value.as_posix() if isinstance(value, Path) else value
        rows.append(f"| `{name}` | `{default if default != '' else chr(39) * 2}` | {field.description} |")
    return "\n".join(rows)
