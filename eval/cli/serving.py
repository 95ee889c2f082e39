"""``ragkv eval serving``: many requests at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.errors import ConfigError
from ragkv.eval.cli.options import AnyModel, Json, check_save, choice, err, names, numbers, out, refuse_options, saving

_ENGINE_ONLY = (
    "model",
    "policies",
    "preemptions",
    "pool_bytes",
    "swap_bytes",
    "max_running",
    "simulate",
    "costs",
)


def serving(
    ctx: typer.Context,
    model: AnyModel = None,
    url: Annotated[
        str | None, typer.Option(help="In place of a model: a running server, asked through its REST API.")
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
    max_running: Annotated[
        str, typer.Option(help="Setting max_running: requests at the same time; several, comma-separated.")
    ] = "",
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
    if url:
        refuse_options(ctx, _ENGINE_ONLY, "--url: the server has its own")
    from ragkv.eval import serving_show
    from ragkv.eval.cache_policy_plot import check
    from ragkv.eval.priorities import PATTERNS
    from ragkv.eval.serving import measure_serving
    from ragkv.eval.serving_plan import ServingPlan
    from ragkv.eval.serving_server import measure_server
    from ragkv.eval.serving_simulated import read_costs
    from ragkv.eval.traces import read_requests
    from ragkv.eval.workloads import Shape

    settings = load_settings(model=model, pool_bytes=pool_bytes, swap_bytes=swap_bytes)
    plan = ServingPlan(
        loads=names(load),
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
        policies=names(policies) or ("",),
        preemptions=names(preemptions),  # type: ignore[arg-type] # it looks itself
        max_running=tuple(int(most) for most in numbers(max_running, "--max-running", 0, 1 << 20)) or (None,),
        updates=choice(updates, PATTERNS, "--updates") if updates else None,
        frequency=frequency,
        slo_ttft_ms=slo_ttft_ms,
        slo_tbt_ms=slo_tbt_ms,
        budget_s=budget_s,
        simulate=simulate or costs is not None,
        costs=read_costs(costs) if costs else None,
    )
    check_save(save)
    if plot:
        check(plot)
    with terminal.progress(err) as say:
        if url:
            result = measure_server(url, settings, plan, say=say, save=saving(save))
        else:
            result = measure_serving(settings, plan, say=say, save=saving(save))
    if plot and result["rows"]:
        serving_show.plot(result["rows"], plot)
    if json_:
        print(json.dumps(result["rows"]))
    elif result["rows"]:
        serving_show.show(out, result["rows"])
    else:
        raise ConfigError("--budget-s was over before anything was measured; raise it")
