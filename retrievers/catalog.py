"""The collections under one root folder, by name."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from pathlib import Path

from ragkv.errors import CollectionError, InputError, NotFoundError
from ragkv.retrievers.collection import DATABASE, Collection
from ragkv.retrievers.splitter import Splitter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str) -> None:
    """Raises InputError where a collection cannot be called that."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"collection name {name!r} is not valid; use 1 to 64 letters, digits, '_', '.' or '-', "
            "beginning with a letter or digit",
            collection=str(name),
        )


class Catalog:
    """Opens, creates and drops collections. Each is a folder under ``root``; all share one splitter.

    Thread-safe. A collection is opened once per catalog and shared; the catalog closes it.
    """

    def __init__(self, root: str | Path, splitter: Splitter, *, embedder: str = "svd") -> None:
        self.root = Path(root)
        self.splitter = splitter
        self.embedder = embedder
        self._open: dict[str, tuple[Collection, int]] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for collection, _ in self._open.values():
                collection.close()
            self._open.clear()

    def names(self) -> list[str]:
        """The names of all collections, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            entry.name for entry in self.root.iterdir() if _NAME.fullmatch(entry.name) and (entry / DATABASE).is_file()
        )

    def open(self, name: str) -> Collection:
        """An existing collection. Raises NotFoundError, or InputError for an impossible name."""
        with self._lock:
            path = self._path(name)
            if not (path / DATABASE).is_file():
                self._forget(name)
                existing = ", ".join(self.names()) or "none yet"
                raise NotFoundError(f"no collection {name!r}; there are: {existing}", collection=name)
            return self._opened(name, None)

    def create(self, name: str, *, embedder: str | None = None) -> Collection:
        """A new collection. Raises InputError where the name is taken or cannot be one."""
        with self._lock:
            if (self._path(name) / DATABASE).exists():
                raise InputError(f"collection {name!r} already exists; open or drop it", collection=name)
            return self._opened(name, embedder or self.embedder)

    def get_or_create(self, name: str) -> Collection:
        with self._lock:
            exists = (self._path(name) / DATABASE).is_file()
            return self.open(name) if exists else self.create(name)

    def drop(self, name: str) -> None:
        """Delete a collection and all it holds. Raises NotFoundError for an unknown name."""
        with self._lock:
            self._path(name)
            if name not in self.names():
                self.open(name)
            self._forget(name)
            # Renamed first, so that a crash half-way leaves no half collection under the name.
            grave = self.root / f".dropped-{name}-{secrets.token_hex(4)}"
            try:
                self._path(name).rename(grave)
            except OSError as error:
                raise CollectionError(f"cannot drop {name!r}: {error.strerror}; check {self.root}") from error
            shutil.rmtree(grave, ignore_errors=True)

    def _opened(self, name: str, embedder: str | None) -> Collection:
        """The shared object; opened anew where another process has since dropped and made the collection."""
        database = self._path(name) / DATABASE
        known = self._open.get(name)
        if known is not None and database.exists() and database.stat().st_ino == known[1]:
            return known[0]
        self._forget(name)
        collection = Collection(self._path(name), self.splitter, embedder=embedder)
        self._open[name] = (collection, database.stat().st_ino)
        return collection

    def _forget(self, name: str) -> None:
        known = self._open.pop(name, None)
        if known is not None:
            known[0].close()

    def _path(self, name: str) -> Path:
        check_name(name)
        return self.root / name
