"""``ragkv eval``: measure retrieval and answer quality; replay questions through a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.errors import ConfigError
from ragkv.eval.questions import jsonl, read_questions
from ragkv.types import ContextPolicy, Method

app = typer.Typer(no_args_is_help=True, help="Measure retrieval and answer quality; replay questions through a server.")
out = Console()
err = Console(stderr=True)

ALL_METHODS = "full,none,hkvd,epic,question,random,default"
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
    method: Annotated[str | None, typer.Option(help="default, none, hkvd, epic, question, random or full.")] = None,
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
    methods: Annotated[str, typer.Option(help="Names, comma-separated.")] = ALL_METHODS,
    ratio: Annotated[str, typer.Option(help="Ratios, comma-separated.")] = "0.15",
    context_policy: Annotated[str, typer.Option(help="`alone`, `document`, or both, comma-separated.")] = "document",
    condition: Annotated[str, typer.Option(help="shuffled, ordered or neighbour-missing.")] = "shuffled",
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 140,
    size: Annotated[int, typer.Option(min=4, help="Documents of a world.")] = 9,
    seed: Annotated[int, typer.Option(help="First world.")] = 0,
    split: Annotated[str, typer.Option(help="train, dev or test: names the model has or has not seen.")] = "test",
    model: Annotated[str | None, typer.Option(help="`bundled`, a folder, or a hub id.")] = None,
    json_: Json = False,
) -> None:
    """Exact match on invented worlds, by kind of question, for every method."""
    from ragkv.checkpoint import load_checkpoint
    from ragkv.eval.quality import CONDITIONS, Setting, WorldsSuite, relate_to_full

    settings = load_settings(model=model)
    asked = [
        Setting(method, share, policy)
        for policy in _choices(context_policy, get_args(ContextPolicy), "--context-policy")
        for method in _choices(methods, get_args(Method), "--methods")
        for share in ([0.0] if method in ("full", "none") else _ratios(ratio))
    ]
    [where] = _choices(condition, CONDITIONS, "--condition")
    [names] = _choices(split, ("train", "dev", "test"), "--split")
    checkpoint = load_checkpoint(
        settings.model, device=settings.device, dtype=settings.dtype, cache_dir=settings.data_dir.expanduser()
    )
    suite = WorldsSuite(checkpoint, size=size, seed=seed, split=names, context_tokens=settings.context_tokens)
    with terminal.progress(err, quiet=json_) as say:
        rows = relate_to_full(suite.run(asked, condition=where, limit=limit, say=say))
    _show(rows, json_)


def _choices(given: str, known: Sequence[str], option: str) -> list[Any]:
    chosen = [name.strip() for name in given.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return chosen


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
