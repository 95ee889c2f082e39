"""``ragkv ingest``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ragkv import terminal
from ragkv.cli.doors import load_documents, open_engine
from ragkv.cli.options import (
    Collection,
    DataDir,
    Device,
    Json,
    Model,
    Sets,
    dumped,
    err,
    out,
    print_json,
    read_settings,
)


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders: .txt, .md, .html, .jsonl.")],
    collection: Collection = "default",
    lazy: Annotated[bool, typer.Option("--lazy", help="Compute KV when a query first needs it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Add documents to a collection and compute their chunks' KV."""
    from ragkv.retrievers.catalog import check_name

    settings = read_settings(sets, model=model, device=device, data_dir=data_dir)
    check_name(collection)
    documents, rejected = load_documents(paths, settings)
    with _resumable() as watched, open_engine(settings) as engine:
        estimate = engine.estimate(documents)
        if not json_:
            terminal.show_estimate(err, estimate)
        if dry_run:
            if json_:
                print_json({"estimate": estimate.model_dump(), "rejected": dumped(rejected)})
            else:
                terminal.show_rejected(out, rejected)
            return
        with terminal.progress(err, quiet=json_) as say:
            report = engine.ingest(collection, documents, encode="lazy" if lazy else None, progress=watched(say))
    if json_:
        print_json(
            {
                **report.model_dump(),
                "rejected": dumped([*rejected, *report.rejected]),
                "estimate": estimate.model_dump(),
            }
        )
    else:
        terminal.show_ingest(out, report, rejected)


@contextmanager
def _resumable() -> Iterator[Callable[[terminal.Say], terminal.Say]]:
    """Ctrl-C in an ingest ends in a line that says how much of it is stored, by the progress that is watched."""
    stored, wanted = 0, 0

    def watched(say: terminal.Say) -> terminal.Say:
        def note(stage: str, done: int, total: int) -> None:
            nonlocal stored, wanted
            if stage == "encode":
                stored, wanted = max(stored, done), total  # several threads tell
            say(stage, done, total)

        return note

    try:
        yield watched
    except KeyboardInterrupt:
        how_far = f"the KV of {stored} of {wanted} chunks is stored" if wanted else "no more KV is stored"
        message = f"interrupted: {how_far}; the same command again goes on from there"
        err.print(message, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
