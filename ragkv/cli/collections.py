"""``ragkv collections``: what was ingested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ragkv import terminal
from ragkv.cli.options import DataDir, Json, Sets, err, out, print_json, read_settings
from ragkv.types import CollectionInfo, DocumentInfo

app = typer.Typer(no_args_is_help=True, help="Look after collections of documents.")

Url = Annotated[str | None, typer.Option(help="Ask a running server instead of the data folder.")]
Name = Annotated[str, typer.Argument(help="Name of the collection.")]


@app.command("list")
def list_all(url: Url = None, data_dir: DataDir = None, sets: Sets = None, json_: Json = False) -> None:
    """All collections: how many documents and chunks they hold."""
    with _shelf(url, data_dir, sets) as shelf:
        found = [info.model_dump() for info in shelf.collections()]
    _show(found, ("name", "documents", "chunks"), json_)
    if not found and not json_:
        err.print("there are none yet: ragkv ingest makes one", style="dim", highlight=False)


@app.command()
def documents(
    name: Name,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Show at most so many.")] = 100,
    url: Url = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """The documents of a collection."""
    with _shelf(url, data_dir, sets) as shelf:
        found = [info.model_dump() for info in shelf.documents(name, offset, limit)]
    _show(found, ("id", "title", "chunks", "characters"), json_)


@app.command()
def drop(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Delete a collection. The KV of its chunks stays until others need the room, who may share it."""
    if not yes and not typer.confirm(f"Delete collection {name!r} and all its documents?", err=True):
        raise typer.Exit(1)
    with _shelf(url, data_dir, sets) as shelf:
        shelf.drop_collection(name)
    print_json({"dropped": name}) if json_ else out.print(f"dropped {name}", markup=False, highlight=False)


class _Folder:
    """As a client has it, of the collections in the data folder; for that no model is loaded."""

    def __init__(self, catalog: Any) -> None:
        self._catalog = catalog

    def collections(self) -> list[CollectionInfo]:
        from ragkv.documents import collection_infos

        return collection_infos(self._catalog)

    def documents(self, name: str, offset: int, limit: int) -> list[DocumentInfo]:
        from ragkv.documents import document_infos

        return document_infos(self._catalog.open(name), offset, limit)

    def drop_collection(self, name: str) -> None:
        self._catalog.drop(name)


@contextmanager
def _shelf(url: str | None, data_dir: Path | None, sets: list[str] | None) -> Iterator[Any]:
    settings = read_settings(sets, data_dir=data_dir)
    if url is not None:
        from ragkv.client import Client

        with Client(url, api_key=settings.bearer_key) as client:
            yield client
        return
    from ragkv.retrievers import Catalog, Splitter

    with Catalog(settings.collections_dir, Splitter(len)) as catalog:  # nothing is split from here
        yield _Folder(catalog)


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], json_: bool) -> None:
    print_json(rows) if json_ else terminal.show_rows(out, rows, columns)
