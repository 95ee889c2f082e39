"""``ragkv eval``: measure retrieval, answer quality and speed; replay questions through a server."""

from __future__ import annotations

import typer

from ragkv.eval.cli.caches import cache_policy, store
from ragkv.eval.cli.quality import quality
from ragkv.eval.cli.questions import passages, replay, retrieval
from ragkv.eval.cli.report import report
from ragkv.eval.cli.serving import serving
from ragkv.eval.cli.speed import decode, load, ttft

app = typer.Typer(
    no_args_is_help=True, help="Measure retrieval, answer quality and speed; replay questions through a server."
)
for _command in (
    passages,
    retrieval,
    replay,
    quality,
    ttft,
    decode,
    load,
    serving,
    report,
    store,
    cache_policy,
):
    app.command()(_command)
