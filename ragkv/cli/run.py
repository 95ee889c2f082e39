"""``ragkv demo`` and ``ragkv serve``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from ragkv import terminal
from ragkv.cli.doors import open_engine
from ragkv.cli.options import DataDir, Device, Json, Model, Sets, err, out, print_json, read_settings


def demo(model: Model = None, device: Device = None, sets: Sets = None, json_: Json = False) -> None:
    """Ask the bundled model questions over bundled documents: full prefill, plain reuse and blend, side by side."""
    from ragkv.demo.run import run_demo

    settings = read_settings(sets, model=model, device=device)
    with terminal.progress(err, quiet=json_) as say:
        result = run_demo(settings, say)
    print_json(result) if json_ else terminal.show_demo(out, result)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 picks a free one.")] = None,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
) -> None:
    """Serve the REST API."""
    from ragkv.server import bind
    from ragkv.server import serve as run_server

    settings = read_settings(sets, host=host, port=port, model=model, device=device, data_dir=data_dir)
    logging.getLogger("ragkv").setLevel(logging.INFO)
    sock = bind(settings)  # before the model is loaded, so that a port in use is told at once
    with sock, open_engine(settings) as engine:
        run_server(sock, engine)
