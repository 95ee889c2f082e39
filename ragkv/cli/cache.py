"""``ragkv cache``: what is stored on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from ragkv import terminal
from ragkv.cli.doors import open_stores
from ragkv.cli.options import DataDir, Json, Sets, out, print_json, read_settings

app = typer.Typer(no_args_is_help=True, help="Look after the chunk store.")
_ON_DISK = ("path", "policy", "entries", "bytes", "capacity_bytes", "session_bytes", "entries_by_model")


@app.command()
def stats(
    url: Annotated[str | None, typer.Option(help="Ask a running server: its hits, RAM and remote tier, too.")] = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """What is stored on disk. Hits, RAM and remote tier are a running server's: ask it with --url."""
    if url is not None:
        from ragkv.client import Client

        with Client(url, api_key=read_settings(sets).bearer_key) as client:
            info = client.cache_stats().model_dump()
    else:
        from ragkv.upkeep import store_info

        with open_stores(sets, data_dir, read_only=True) as (store, sessions):
            info = store_info(store, sessions).model_dump(include=set(_ON_DISK))
    print_json(info) if json_ else terminal.show_fields(out, info)


@app.command()
def check(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what is found.")] = False,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Compare index and files, verify every checksum. Exit status 1 when something is wrong."""
    from ragkv.upkeep import store_check

    with open_stores(sets, data_dir, read_only=not fix) as (store, _):
        report = store_check(store, fix=fix)
    print_json(report.model_dump()) if json_ else terminal.show_fields(out, report.model_dump())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Remove all KV on disk that is not in use, of chunks and of idle conversations. Collections stay; KV is computed
    again when needed."""
    if not yes and not typer.confirm("Remove all stored KV?", err=True):
        raise typer.Exit(1)
    with open_stores(sets, data_dir) as stores:
        removed = sum(store.clear() for store in stores if store)
    print_json({"removed": removed}) if json_ else out.print(f"removed {removed} entries")
