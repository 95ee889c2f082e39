"""``ragkv eval ttft | decode | load``: how soon answers begin, how fast they go on, how many begin in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.eval.cli.options import (
    AnyModel,
    Json,
    Ratio,
    check_save,
    choices,
    err,
    names,
    numbers,
    out,
    ratios,
    save_result,
    saving,
    show_rows,
)
from ragkv.types import Method


def ttft(
    model: AnyModel = None,
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
        typer.Option("--out", "--save", help="Write rows, rates and environment into this file, after every pass."),
    ] = None,
    json_: Json = False,
) -> None:
    """Time to first token: every method on every tier, beside full prefill and what the machine could do at best."""
    from ragkv.eval import ttft_show
    from ragkv.eval.cache_policy_plot import check
    from ragkv.eval.quality import grid
    from ragkv.eval.ttft import Plan, measure_ttft

    settings = load_settings(model=model)
    chosen = choices(methods, get_args(Method), "--methods")
    asked = grid(chosen, ratios(ratio), ["alone"], settings.ratio)
    plan = Plan(
        contexts=tuple(int(tokens) for tokens in numbers(context, "--context", 0, 1 << 24)),
        tiers=names(tiers),
        codecs=names(codec),
        asked=tuple((one.method, one.ratio) for one in asked),
        chunk_tokens=chunk_tokens,
        question_tokens=question_tokens,
        batch=batch,
        passes=passes,
        budget_s=budget_s,
    )
    check_save(save)
    if plot:
        check(plot)
    with terminal.progress(err) as say:
        result = measure_ttft(settings, plan, say=say, save=saving(save))
    if plot:
        ttft_show.plot(result["rows"], plot)
    if json_:
        print(json.dumps(result["rows"]))
        return
    ttft_show.show(out, result["rows"])


def decode(
    model: AnyModel = None,
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
        [int(number) for number in numbers(text, option, 0, 1 << 24)]
        for text, option in ((batch, "--batch"), (context, "--context"))
    )
    check_save(save)
    with terminal.progress(err) as say:
        result = measure_decode(settings, batches, contexts, say=say)
    if save:
        save_result(save, result)
    show_rows(result["rows"], json_)


def load(
    model: AnyModel = None,
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
    asked = grid(choices(methods, get_args(Method), "--methods"), ratios(ratio), ["alone"], settings.ratio)
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
    check_save(save)
    with terminal.progress(err) as say:
        result = measure_load(settings, plan, say=say, save=saving(save))
    if json_:
        print(json.dumps(result["rows"]))
        return
    ttft_show.show_load(out, result["rows"])
