"""``ragkv eval quality``: are the answers still right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.eval.cases import CONDITIONS, Draw
from ragkv.eval.cli.options import (
    Json,
    Ratio,
    check_save,
    choice,
    choices,
    err,
    out,
    ratios,
    refuse_options,
    save_result,
)
from ragkv.eval.data import METRICS, Data
from ragkv.eval.questions import read_questions
from ragkv.eval.worlds_names import SPLITS
from ragkv.types import ContextPolicy, Method

ALL_METHODS = "full,none,hkvd,epic,question,random,echo,links,default"
# Options that would do nothing, and so must not be given.
_WORLDS_ONLY = ("suite", "size", "context_tokens", "seed", "split")
_DATA_ONLY = ("metric", "max_tokens")


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
    check_save(save)
    choice(suite, ("worlds",), "--suite")
    refuse_options(ctx, _WORLDS_ONLY if data else _DATA_ONLY, "--data" if data else "worlds")
    from ragkv.checkpoint import find_device
    from ragkv.eval.machine import environment
    from ragkv.eval.quality import grid, measure_quality
    from ragkv.eval.quality_rows import read_rows

    if rows_from:
        rows = read_rows(rows_from)
    else:
        settings = load_settings(model=model, kv_codec=codec)
        names = choice(split, SPLITS, "--split")
        policies = choices(context_policy, get_args(ContextPolicy), "--context-policy")
        asked = grid(choices(methods, get_args(Method), "--methods"), ratios(ratio), policies, settings.ratio)
        conditions = choices(condition or ("ordered" if data else "shuffled"), CONDITIONS, "--condition")
        draw: Draw | Data = Draw(limit or 140, size, context_tokens, seed, names)
        if data:
            measure = choice(metric, ("auto", *METRICS), "--metric")
            draw = Data(read_questions(data), data.name, measure, limit, max_tokens)
        with terminal.progress(err, quiet=json_) as say:
            rows = measure_quality(settings, asked, conditions, draw, jobs=jobs, each_alone=each_alone, say=say)
        if save:
            save_result(save, {"rows": rows} | environment(find_device(settings.device)))
    if plot:
        from ragkv.eval.quality_plot import plot as draw_rows

        draw_rows(rows, plot, kinds=plot_kinds)
    if json_:
        print(json.dumps(rows))
    else:
        from ragkv.eval.quality_table import show

        show(out, rows)
