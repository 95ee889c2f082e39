"""What a command works with: an engine of its own or a running server, stores alone, documents from files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv import terminal
from ragkv.cli.options import err, read_settings
from ragkv.config import Settings
from ragkv.errors import InputError, RagkvError
from ragkv.types import RejectedDocument

if TYPE_CHECKING:
    from ragkv.engine import Engine
    from ragkv.retrievers import Document
    from ragkv.store import ChunkStore


@contextmanager
def open_engine(settings: Settings) -> Iterator[Engine]:
    with err.status(f"loading {settings.model}"):
        from ragkv.engine import Engine

        engine = Engine(settings)
    with engine:
        yield engine


@contextmanager
def open_door(url: str | None, sets: list[str] | None, *, quiet: bool, **flags: Any) -> Iterator[Any]:
    """A client of a running server, or an engine of our own, which stores what was missing; both have ``stream``."""
    settings = read_settings(sets, **flags)
    if url is None:
        with open_engine(settings) as engine:
            yield engine
            _drain(engine, quiet)
        return
    from ragkv.client import Client

    with Client(url, api_key=settings.bearer_key) as client:
        yield client


def _drain(engine: Engine, quiet: bool) -> None:
    if not engine.health().encoding:
        return
    with suppress(KeyboardInterrupt), terminal.progress(err, quiet=quiet) as say:
        engine.drain(progress=say)


@contextmanager
def open_stores(
    sets: list[str] | None, data_dir: Path | None, *, read_only: bool = False
) -> Iterator[tuple[ChunkStore, ChunkStore | None]]:
    """The chunk store, and the one of idle conversations where there is one."""
    from ragkv.store import ChunkStore

    settings = read_settings(sets, data_dir=data_dir)
    with ExitStack() as stack:

        def opened(folder: Path, capacity_bytes: int, policy: str) -> ChunkStore:
            # Only looking needs no right to write; but there must be something to look at.
            look = read_only and folder.is_dir()
            store = ChunkStore(folder, capacity_bytes=capacity_bytes, policy=policy, ram_bytes=0, read_only=look)
            return stack.enter_context(store)

        there = settings.sessions_dir.is_dir()
        yield (
            opened(settings.store_dir, settings.store_bytes, settings.store_policy),
            opened(settings.sessions_dir, sys.maxsize, "lru") if there else None,  # nothing is put there from here
        )


def load_documents(paths: Iterable[Path], settings: Settings) -> tuple[list[Document], list[RejectedDocument]]:
    from ragkv.documents import distinct
    from ragkv.retrievers import load_path

    rejected: list[RejectedDocument] = []

    def note(error: RagkvError) -> None:
        name = str(error.context.get("document_id", error.context.get("path", "")))
        rejected.append(RejectedDocument(document_id=name, error=error.code, message=error.message))

    found = (load_path(path, max_bytes=settings.max_document_bytes, on_error=note) for path in paths)
    documents = list(distinct(chain.from_iterable(found), note))
    if not documents and rejected:
        raise InputError("; ".join(one.message for one in rejected[:3]), rejected=len(rejected))
    if not documents:
        raise InputError("no documents found: give .txt, .md, .html or .jsonl files, or folders of them")
    return documents, rejected
