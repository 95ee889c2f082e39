"""``ragkv eval store | cache-policy``: the chunk store's speed, and what it should keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.errors import ConfigError
from ragkv.eval.cli.options import Json, choices, err, numbers, out, show_rows
from ragkv.store.policies import POLICIES


def store(
    size: Annotated[str, typer.Option(help="Whose KV: 8b, 1b or tiny.")] = "8b",
    entries: Annotated[int, typer.Option(min=1, help="Chunks to write and read in a pass.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 512,
    passes: Annotated[int, typer.Option(min=1, help="Passes; figures are medians over them.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Entries of the index that is opened and asked.")] = 1_000_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that everybody reads and writes with.")] = 4,
    path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder on the disk to measure (data folder).")
    ] = None,
    json_: Json = False,
) -> None:
    """The chunk store's speed, beside the raw disk's and beside what else chunks could be kept in."""
    from ragkv.eval.store_speed import Plan, measure_store, tables

    plan = Plan(size, entries, tokens, passes, rows, threads, path or load_settings().data_dir.expanduser())
    with terminal.progress(err) as say:
        result = measure_store(plan, say=say)
    if json_:
        print(json.dumps(result))
        return
    for name, lines in tables(result).items():
        out.print(f"\n[bold]{escape(name)}[/]", highlight=False)
        if lines:
            show_rows(lines, as_json=False)


def cache_policy(
    trace: Annotated[
        Path | None, typer.Argument(help="A conversation trace: JSON lines with hash_ids of 512-token blocks.")
    ] = None,
    policies: Annotated[str, typer.Option(help="Names, comma-separated.")] = ",".join(POLICIES),
    sizes: Annotated[str, typer.Option(help="Sizes of the cache, in % of all distinct tokens.")] = "1,3,10,30",
    zipf: Annotated[str, typer.Option(help="Exponents of the Zipf traces; empty for none.")] = "0.6,0.8,1.0,1.2",
    scan_share: Annotated[float, typer.Option(min=0, max=0.9, help="One-hit share of the Zipf traces.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the Zipf traces.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw what is saved: .png, .svg, .pdf.")] = None,
    json_: Json = False,
) -> None:
    """Which chunks the store should keep: every eviction policy on traces, beside the optimum."""
    from ragkv.eval import cache_policy_plot
    from ragkv.eval.cache_policy import compare, tables
    from ragkv.eval.traces import read_trace, zipf_trace

    names = choices(policies, tuple(POLICIES), "--policies")
    shares = [size / 100 for size in numbers(sizes, "--sizes", 0, 100)]
    exponents = numbers(zipf, "--zipf", 0, 10)
    if plot:
        cache_policy_plot.check(plot)
    traces = [read_trace(trace)] if trace else []
    traces += [zipf_trace(exponent, seed=seed, scan_share=scan_share) for exponent in exponents]
    if not (names and shares and traces):
        raise ConfigError("nothing to compare: name a trace or --zipf, --policies and --sizes")
    with terminal.progress(err) as say:
        result = compare(traces, names, shares, say=say)
    if plot:
        cache_policy_plot.plot(result, plot)
    if json_:
        print(json.dumps(result))
        return
    for name, lines in tables(result).items():
        out.print(f"\n[bold]{name}[/]", highlight=False)
        show_rows(lines, as_json=False)
    out.print(f"\nmost saved over all: {result['winner']}", highlight=False)
