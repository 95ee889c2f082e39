"""``ragkv eval passages | retrieval | replay``: a file of questions, its passages, and a server that is asked."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ragkv import terminal
from ragkv.config import load_settings
from ragkv.eval.cli.options import File, Json, err, out, show_rows
from ragkv.eval.questions import jsonl, read_questions


def passages(file: File) -> None:
    """Print a question file's distinct passages as .jsonl, for `ragkv ingest`."""
    for line in jsonl(read_questions(file).passages):
        print(line)


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
    show_rows(rows, json_)


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
    with Client(url, api_key=load_settings().bearer_key) as client, terminal.progress(err, quiet=json_) as say:
        result = run(read_questions(file), client, collection, fields=given, say=say)
    if json_:
        print(json.dumps(result))
    else:
        terminal.show_fields(out, result)
    if result["faults"]:
        raise typer.Exit(1)
