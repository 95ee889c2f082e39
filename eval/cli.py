"""``ragkv eval``: measure retrieval, answer quality and speed; replay questions through a server."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.errors import ConfigError, InputError
from ragkv.eval.cases import CONDITIONS, Draw
from ragkv.eval.data import METRICS, Data
from ragkv.eval.questions import jsonl, read_questions
from ragkv.eval.worlds_names import SPLITS
from ragkv.store.policies import POLICIES
from ragkv.types import ContextPolicy, Method

app = typer.Typer(
    no_args_is_help=True, help="Measure retrieval, answer quality and speed; replay questions through a server."
)
out = Console()
err = Console(stderr=True)

ALL_METHODS = "full,none,hkvd,epic,question,random,echo,links,default"
Ratio = Annotated[
    str,
    typer.Option(help="Ratios, comma-separated, for every method but `full`, `none` and `default`, which has its own."),
]
File = Annotated[Path, typer.Argument(help="Questions in the MuSiQue style: a JSON list of question, answers, ctxs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def passages(file: File) -> None:
    """Print a question file's distinct passages as .jsonl, for `ragkv ingest`."""
    for line in jsonl(read_questions(file).passages):
        print(line)


@app.command()
def retrieval(
    file: File,
    k: Annotated[int, typer.Option(min=1, help="Passages to find.")] = 10,
    embedder: Annotated[str, typer.Option(help="`svd`, a local path, or a hub id.")] = "svd",
    json_: Json = False,
) -> None:
    """Recall of a question's own passages: BM25, dense and fused."""
    from ragkv.eval.retrieval import measure_retrieval

    questions = read_questions(file)
    with terminal.progress(err, quiet=json_) as say:
        rows = measure_retrieval(questions, k=k, chunk_tokens=load_settings().chunk_tokens, embedder=embedder, say=say)
    _show(rows, json_)


@app.command()
def replay(
    file: File,
    url: Annotated[str, typer.Option(help="A running server.")] = "http://127.0.0.1:8377",
    collection: Annotated[str, typer.Option("--collection", "-c", help="Name of the collection.")] = "default",
    method: Annotated[
        str | None, typer.Option(help="default, none, hkvd, epic, question, echo, links, random or full.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks to retrieve.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate per question.")] = 16,
    json_: Json = False,
) -> None:
    """Stream every question through a running server and check every report. Exit status 1 on any fault."""
    from ragkv.client import Client
    from ragkv.eval.replay import replay as run

    fields = {"method": method, "top_k": top_k, "max_tokens": max_tokens}
    given = {key: value for key, value in fields.items() if value is not None}
    with Client(url, api_key=load_settings().api_key) as client, terminal.progress(err, quiet=json_) as say:
        result = run(read_questions(file), client, collection, fields=given, say=say)
    if json_:
        print(json.dumps(result))
    else:
        terminal.show_fields(out, result)
    if result["faults"]:
        raise typer.Exit(1)


@app.command()
def quality(
    ctx: typer.Context,
    suite: Annotated[str, typer.Option(help="worlds: invented worlds, which nobody knows by heart.")] = "worlds",
    data: Annotated[
        Path | None,
        typer.Option(help="In place of --suite: your own questions, .json or .jsonl of question, answers and ctxs."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="For --data: f1, em, rouge-l, agreement (with full prefill), or auto.")
    ] = "auto",
    methods: Annotated[str, typer.Option(help="Names, comma-separated.")] = ALL_METHODS,
    ratio: Ratio = "0.15",
    context_policy: Annotated[str, typer.Option(help="`alone`, `document`, or both, comma-separated.")] = "document",
    condition: Annotated[
        str | None,
        typer.Option(
            help="shuffled, ordered, neighbour-missing, comma-separated. All are asked the same questions: with "
            "neighbour-missing among them only such as have a neighbour to miss. Worlds are shuffled if nothing is "
            "said, --data is asked in its own order."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions to ask: of worlds 140, all kinds in equal numbers; of --data all."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="For --data: most tokens of an answer; 128 for ROUGE-L, else 32, if nothing is said."),
    ] = None,
    size: Annotated[int, typer.Option(min=4, help="Chunks of a world.")] = 12,
    context_tokens: Annotated[
        int | None, typer.Option(min=256, help="In place of --size: add documents up to about so many tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="First world.")] = 0,
    split: Annotated[str, typer.Option(help="train, dev or test: names the model has or has not seen.")] = "test",
    model: Annotated[str | None, typer.Option(help="`bundled`, a folder, or a hub id.")] = None,
    codec: Annotated[str | None, typer.Option(help="Of the stored KV: raw, int8 or fp8.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    each_alone: Annotated[
        bool, typer.Option("--each-alone", help="Ask every question from scratch, which is slow, and report TTFT.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against recomputed share: .png, .svg, .pdf.")] = None,
    plot_kinds: Annotated[bool, typer.Option("--plot-kinds", help="Draw the kinds of question as well.")] = False,
    rows_from: Annotated[
        Path | None, typer.Option("--rows", help="Ask nothing: show or draw the rows of an earlier run in this file.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write rows and environment into this file.")] = None,
    json_: Json = False,
) -> None:
    """Answer quality of every method beside full prefill, on invented worlds or on your own questions."""
    _check_save(save)
    _choice(suite, ("worlds",), "--suite")
    _refuse_options(ctx, _WORLDS_ONLY if data else _DATA_ONLY, "--data" if data else "worlds")
    from ragkv.checkpoint import find_device
    from ragkv.eval.machine import environment
    from ragkv.eval.quality import grid, measure_quality
    from ragkv.eval.quality_rows import read_rows

    if rows_from:
        rows = read_rows(rows_from)
    else:
        settings = load_settings(model=model, kv_codec=codec)
        names = _choice(split, SPLITS, "--split")
        policies = _choices(context_policy, get_args(ContextPolicy), "--context-policy")
        asked = grid(_choices(methods, get_args(Method), "--methods"), _ratios(ratio), policies, settings.ratio)
        conditions = _choices(condition or ("ordered" if data else "shuffled"), CONDITIONS, "--condition")
        draw: Draw | Data = Draw(limit or 140, size, context_tokens, seed, names)
        if data:
            measure = _choice(metric, ("auto", *METRICS), "--metric")
            draw = Data(read_questions(data), data.name, measure, limit, max_tokens)
        with terminal.progress(err, quiet=json_) as say:
            rows = measure_quality(settings, asked, conditions, draw, jobs=jobs, each_alone=each_alone, say=say)
        if save:
            _save(save, {"rows": rows} | environment(find_device(settings.device)))
    if plot:
        from ragkv.eval.quality_plot import plot as draw_rows

        draw_rows(rows, plot, kinds=plot_kinds)
    if json_:
        print(json.dumps(rows))
    else:
        from ragkv.eval.quality_table import show

        show(out, rows)


@app.command()
def ttft(
    model: Annotated[
        str | None, typer.Option(help="`bundled`, a folder, a hub id, or random:<preset>: shapes without weights.")
    ] = None,
    context: Annotated[str, typer.Option(help="Context tokens, comma-separated.")] = "4096",
    tiers: Annotated[
        str, typer.Option(help="Where chunks come from: device, ram, ssd, remote, comma-separated.")
    ] = "ram,ssd",
    methods: Annotated[str, typer.Option(help="Names, comma-separated.")] = "full,none,question,echo,links,default",
    ratio: Ratio = "0.05,0.15",
    codec: Annotated[str, typer.Option(help="Of the stored KV: raw, int8, fp8, comma-separated.")] = "raw",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 512,
    question_tokens: Annotated[int, typer.Option(help="Tokens of the question.")] = 32,
    batch: Annotated[int, typer.Option(help="Requests that come at once; figures are medians over them.")] = 1,
    passes: Annotated[int, typer.Option(help="Passes; figures are medians over them.")] = 5,
    budget_s: Annotated[
        float | None, typer.Option(min=1, help="About how long it may take: fewer passes, three at the least.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw TTFT, with the floors: .png, .svg, .pdf.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--out", "--save", help="Write rows, rates and environment into this file, after every context."),
    ] = None,
    json_: Json = False,
) -> None:
    """Time to first token: every method on every tier, beside full prefill and what the machine could do at best."""
    from ragkv.eval import ttft_show
    from ragkv.eval.cache_policy_plot import check
    from ragkv.eval.quality import grid
    from ragkv.eval.ttft import Plan, measure_ttft

    settings = load_settings(model=model)
    names = _choices(methods, get_args(Method), "--methods")
    asked = grid(names, _ratios(ratio), ["alone"], settings.ratio)
    plan = Plan(
        contexts=tuple(int(tokens) for tokens in _numbers(context, "--context", 0, 1 << 24)),
        tiers=_names(tiers),
        codecs=_names(codec),
        asked=tuple((one.method, one.ratio) for one in asked),
        chunk_tokens=chunk_tokens,
        question_tokens=question_tokens,
        batch=batch,
        passes=passes,
        budget_s=budget_s,
    )
    _check_save(save)
    if plot:
        check(plot)
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = measure_ttft(settings, plan, say=say, save=_saving(save))
    if plot:
        ttft_show.plot(result["rows"], plot)
    if json_:
        print(json.dumps(result["rows"]))
        return
    ttft_show.show(out, result["rows"])


@app.command()
def decode(
    model: Annotated[
        str | None, typer.Option(help="`bundled`, a folder, a hub id, or random:<preset>: shapes without weights.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Requests decoded together, comma-separated.")] = "1,8,32,64,128",
    context: Annotated[str, typer.Option(help="Context tokens of each, comma-separated.")] = "1024,8192",
    save: Annotated[
        Path | None, typer.Option("--out", "--save", help="Write rows, rate and environment into this file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Inter-token latency of many requests at once, beside the time that reading weights and KV takes."""
    from ragkv.eval.decode import measure_decode

    settings = load_settings(model=model)
    batches, contexts = (
        [int(number) for number in _numbers(text, option, 0, 1 << 24)]
        for text, option in ((batch, "--batch"), (context, "--context"))
    )
    _check_save(save)
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = measure_decode(settings, batches, contexts, say=say)
    if save:
        _save(save, result)
    _show(result["rows"], json_)


@app.command()
def load(
    model: Annotated[
        str | None, typer.Option(help="`bundled`, a folder, a hub id, or random:<preset>: shapes without weights.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Context tokens of a prompt.")] = 8192,
    tier: Annotated[str, typer.Option(help="Where chunks come from: device, ram or ssd.")] = "ram",
    methods: Annotated[str, typer.Option(help="Names, comma-separated; full prefill is always there.")] = (
        "full,links,default"
    ),
    ratio: Ratio = "0.15",
    codec: Annotated[str, typer.Option(help="Of the stored KV: raw, int8 or fp8.")] = "raw",
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 512,
    question_tokens: Annotated[int, typer.Option(help="Tokens of the question.")] = 32,
    pool: Annotated[int, typer.Option(help="Chunks that prompts are drawn from.")] = 32,
    prompts: Annotated[int, typer.Option(help="Different prompts.")] = 12,
    limit: Annotated[float, typer.Option(help="Most time to first token, in full prefills of an idle machine.")] = 2.0,
    percentile: Annotated[float, typer.Option(help="Of the requests that have to keep it, in %.")] = 90.0,
    confirm_s: Annotated[float, typer.Option(min=0.1, help="How long requests really come, per method.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option("--out", "--save", help="Write rows and environment into this file, after every method."),
    ] = None,
    json_: Json = False,
) -> None:
    """Requests a second that get their first token in time: every method beside full prefill."""
    from ragkv.eval import ttft_show
    from ragkv.eval.load import LoadPlan, measure_load
    from ragkv.eval.quality import grid

    settings = load_settings(model=model)
    asked = grid(_choices(methods, get_args(Method), "--methods"), _ratios(ratio), ["alone"], settings.ratio)
    plan = LoadPlan(
        context=context,
        tier=tier,
        codec=codec,
        asked=tuple((one.method, one.ratio) for one in asked),
        chunk_tokens=chunk_tokens,
        question_tokens=question_tokens,
        pool=pool,
        prompts=prompts,
        limit=limit,
        percentile=percentile,
        confirm_s=confirm_s,
        seed=seed,
    )
    _check_save(save)
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = measure_load(settings, plan, say=say, save=_saving(save))
    if json_:
        print(json.dumps(result["rows"]))
        return
    ttft_show.show_load(out, result["rows"])


@app.command()
def serving(
    model: Annotated[
        str | None, typer.Option(help="`bundled`, a folder, a hub id, or random:<preset>: shapes without weights.")
    ] = None,
    load: Annotated[
        str,
        typer.Option(
            help="trace, poisson, bursty, on-off, sessions, sessions-rag, sessions-priority, sessions-random, "
            "tenants-overload, tenants-on-off, tenants-weights, tenants-short-long, tenants-honest, tenants-flood; "
            "comma-separated."
        ),
    ] = "sessions-priority",
    policies: Annotated[
        str, typer.Option(help="fcfs, priority, vtc, comma-separated; of each load its own if nothing is said.")
    ] = "",
    preemptions: Annotated[
        str, typer.Option(help="recompute, blockwise, groups, async, reuse, comma-separated.")
    ] = "recompute,reuse",
    trace: Annotated[
        Path | None, typer.Option(help="A conversation trace: JSON lines with lengths and hash_ids; else invented.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests, turns of conversations included.")] = 300,
    rate: Annotated[float, typer.Option(help="Requests a second, of all tenants together.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(help="Most new tokens of a prompt.")] = 2048,
    output_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 256,
    context_tokens: Annotated[int, typer.Option(help="Most tokens of a conversation.")] = 8192,
    think_s: Annotated[float, typer.Option(help="Seconds between a reply and the next turn, on average.")] = 5.0,
    chunks: Annotated[int, typer.Option(help="Retrieved chunks a turn, for sessions-rag.")] = 4,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 512,
    pool: Annotated[int, typer.Option(help="Chunks that turns retrieve from.")] = 32,
    updates: Annotated[
        str | None, typer.Option(help="How priorities of live requests change: random, markov; else as the load says.")
    ] = None,
    frequency: Annotated[float, typer.Option(help="Updates of priorities per step of the engine.")] = 0.02,
    pool_bytes: Annotated[int | None, typer.Option(help="Setting pool_bytes: KV on the device.")] = None,
    swap_bytes: Annotated[int | None, typer.Option(help="Setting swap_bytes: KV in RAM.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Setting max_running: requests at the same time.")] = None,
    slo_ttft_ms: Annotated[float, typer.Option(help="For goodput: most time to the first token.")] = 1000.0,
    slo_tbt_ms: Annotated[float, typer.Option(help="For goodput: most mean time between tokens.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths, tokens and priorities.")] = 0,
    budget_s: Annotated[
        float | None, typer.Option(min=1, help="How long all of it may take; each run gets the same share.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run everything through the simulator, too.")] = False,
    costs: Annotated[
        Path | None, typer.Option(help="For --simulate: step costs of an earlier result; else fitted to each run.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the tails: .png, .svg, .pdf.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--out", "--save", help="Write rows and environment into this file, after every run."),
    ] = None,
    json_: Json = False,
) -> None:
    """Many requests on one engine: tails, throughput and fairness, for every policy and way to preempt."""
    from ragkv.eval import serving_show
    from ragkv.eval.cache_policy_plot import check
    from ragkv.eval.priorities import PATTERNS
    from ragkv.eval.serving import ServingPlan, measure_serving
    from ragkv.eval.serving_simulated import read_costs
    from ragkv.eval.traces import read_requests
    from ragkv.eval.workloads import Shape

    settings = load_settings(model=model, pool_bytes=pool_bytes, swap_bytes=swap_bytes, max_running=max_running)
    plan = ServingPlan(
        loads=_names(load),
        shape=Shape(
            requests=requests,
            rate=rate,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            context_tokens=context_tokens,
            think_s=think_s,
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            pool=pool,
            seed=seed,
            trace=read_requests(trace) if trace else (),
        ),
        policies=_names(policies) or ("",),
        preemptions=_names(preemptions),  # type: ignore[arg-type] # it looks itself
        updates=_choice(updates, PATTERNS, "--updates") if updates else None,
        frequency=frequency,
        slo_ttft_ms=slo_ttft_ms,
        slo_tbt_ms=slo_tbt_ms,
        budget_s=budget_s,
        simulate=simulate or costs is not None,
        costs=read_costs(costs) if costs else None,
    )
    _check_save(save)
    if plot:
        check(plot)
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = measure_serving(settings, plan, say=say, save=_saving(save))
    if plot and result["rows"]:
        serving_show.plot(result["rows"], plot)
    if json_:
        print(json.dumps(result["rows"]))
    elif result["rows"]:
        serving_show.show(out, result["rows"])
    else:
        raise ConfigError("--budget-s was over before anything was measured; raise it")


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of `eval ttft`, `quality` and `serving`, or folders of such.")
    ],
    page: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "ragkv: what was measured",
) -> None:
    """One HTML page of result files, which stands alone: quality against speed, where the time goes, all figures."""
    from ragkv.eval.report import write_report

    read = write_report(results, page, title)
    if read.skipped:
        err.print(f"left out, nothing to show: {', '.join(read.skipped)}", style="dim", markup=False)
    runs = f", {len(read.serving)} serving runs" if read.serving else ""
    counts = f"{len(read.speed)} times and {len(read.quality)} scores{runs} of {len(read.sources)} files"
    out.print(f"{page}: {counts}", markup=False, highlight=False)


@app.command()
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
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = measure_store(plan, say=say)
    if json_:
        print(json.dumps(result))
        return
    for name, lines in tables(result).items():
        out.print(f"\n[bold]{escape(name)}[/]", highlight=False)
        if lines:
            _show(lines, as_json=False)


@app.command("cache-policy")
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

    names = _choices(policies, tuple(POLICIES), "--policies")
    shares = [size / 100 for size in _numbers(sizes, "--sizes", 0, 100)]
    exponents = _numbers(zipf, "--zipf", 0, 10)
    if plot:
        cache_policy_plot.check(plot)
    traces = [read_trace(trace)] if trace else []
    traces += [zipf_trace(exponent, seed=seed, scan_share=scan_share) for exponent in exponents]
    if not (names and shares and traces):
        raise ConfigError("nothing to compare: name a trace or --zipf, --policies and --sizes")
    with terminal.progress(err, quiet=not err.is_terminal) as say:
        result = compare(traces, names, shares, say=say)
    if plot:
        cache_policy_plot.plot(result, plot)
    if json_:
        print(json.dumps(result))
        return
    for name, lines in tables(result).items():
        out.print(f"\n[bold]{name}[/]", highlight=False)
        _show(lines, as_json=False)
    out.print(f"\nmost saved over all: {result['winner']}", highlight=False)


# Options that would do nothing, and so must not be given.
_WORLDS_ONLY = ("suite", "size", "context_tokens", "seed", "split")
_DATA_ONLY = ("metric", "max_tokens")


def _refuse_options(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} does not go with {why}; leave it out")


def _check_save(path: Path | None) -> None:
    """Before anything takes its time."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"{path} cannot be written: name a file in a folder that exists", path=str(path))


def _save(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps({"command": " ".join(["ragkv", *sys.argv[1:]]), **result}, indent=1) + "\n", "utf-8")


def _saving(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """Writes what there is so far, and says so where no bar does."""
    started = time.perf_counter()

    def save(result: dict[str, Any]) -> None:
        if path:
            _save(path, result)
        if not err.is_terminal:
            seconds = time.perf_counter() - started
            print(f"{len(result['rows'])} rows after {seconds:.0f} s", file=sys.stderr, flush=True)

    return save


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _choices(given: str, known: Sequence[str], option: str) -> list[Any]:
    chosen = list(_names(given))
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return chosen


def _choice(given: str, known: Sequence[str], option: str) -> Any:
    """The one choice; several, or none, are as wrong as an unknown one."""
    if given not in known:
        raise ConfigError(f"{option}: {given!r} is not one of {', '.join(known)}")
    return given


def _numbers(given: str, option: str, least: float, most: float) -> list[float]:
    try:
        numbers = [float(part) for part in given.split(",") if part.strip()]
    except ValueError:
        numbers = [math.nan]
    if not all(least < number <= most for number in numbers):
        raise ConfigError(f"{option} wants numbers above {least}, up to {most}, got {given!r}")
    return numbers


def _ratios(given: str) -> list[float]:
    try:
        ratios = [float(part) for part in given.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ratio wants numbers from 0 to 1, got {given!r}") from error
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ConfigError(f"--ratio wants numbers from 0 to 1, got {given!r}")
    return ratios


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    flat = [_flat(row) for row in rows]
    table = Table(*flat[0], box=None, header_style="dim")
    for row in flat:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its inner tables spread out into columns."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat
