"""A collection's documents and chunks in one SQLite file.

Write-ahead logging keeps the file whole when the process is killed at any point, and lets other processes
read and write beside us. Every write transaction changes ``stamp``, by which indexes learn that they are out
of date.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ragkv.errors import CollectionError
from ragkv.retrievers.types import Chunk, Document, chunk_id

_APPLICATION_ID = 0x7261676B  # "ragk"
_FORMAT = 1
_BUSY_SECONDS = 60.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, title TEXT, metadata TEXT NOT NULL,
    digest BLOB NOT NULL, chunks INTEGER NOT NULL, characters INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS chunks (
    document INTEGER NOT NULL REFERENCES documents (seq) ON DELETE CASCADE, ordinal INTEGER NOT NULL,
    text TEXT NOT NULL, PRIMARY KEY (document, ordinal)
) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('stamp', 'new')
"""
_PUT = """
INSERT INTO documents (id, title, metadata, digest, chunks, characters) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET title = excluded.title, metadata = excluded.metadata,
    digest = excluded.digest, chunks = excluded.chunks, characters = excluded.characters
RETURNING seq
"""
_INFO = "SELECT id, title, metadata, chunks, characters FROM documents"


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A document as listed: everything but its text. ``characters`` counts its ``full_text``."""

    id: str
    title: str | None
    metadata: dict[str, object]
    chunks: int
    characters: int


class Database:
    """One connection, shared by the process's threads under a lock.

    ``write`` and ``read`` are transactions; the other methods must be called inside one. Raises
    CollectionError where the file is damaged, not ours, of a newer format, locked for a minute, or the disk
    is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._errors():
            self._sql = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._sql.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    @contextmanager
    def write(self) -> Iterator[None]:
        """A write transaction: all of it or nothing; changes ``stamp``."""
        with self._transaction("BEGIN IMMEDIATE"):
            yield
            self.set_meta("stamp", secrets.token_hex(8))

    @contextmanager
    def read(self) -> Iterator[None]:
        """A read transaction: everything read inside is of one moment."""
        with self._transaction("BEGIN"):
            yield

    def meta(self, key: str) -> str | None:
        row = self._sql.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        self._sql.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value)
        )

    def digests(self, ids: Sequence[str]) -> dict[str, bytes]:
        rows = self._sql.execute(
            "SELECT id, digest FROM documents WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(ids),),
        )
        return dict(rows.fetchall())

    def put(self, document: Document, digest: bytes, chunks: Sequence[Chunk]) -> list[str] | None:
        """Add or replace a document, in its old place; returns the replaced chunks' texts, or None."""
        old = self.chunk_texts(document.id)
        size = sum(len(chunk.text) for chunk in chunks)
        metadata = json.dumps(dict(document.metadata), ensure_ascii=False)
        (seq,) = self._sql.execute(
            _PUT,
            (document.id, document.title, metadata, digest, len(chunks), size),
        ).fetchone()
        self._sql.execute("DELETE FROM chunks WHERE document = ?", (seq,))
        self._sql.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?)", [(seq, chunk.ordinal, chunk.text) for chunk in chunks]
        )
        return old

    def delete(self, document_id: str) -> bool:
        return self._sql.execute("DELETE FROM documents WHERE id = ?", (document_id,)).rowcount > 0

    def info(self, document_id: str) -> DocumentInfo | None:
        row = self._sql.execute(f"{_INFO} WHERE id = ?", (document_id,)).fetchone()
        return None if row is None else _info(row)

    def infos(self, offset: int, limit: int) -> list[DocumentInfo]:
        rows = self._sql.execute(f"{_INFO} ORDER BY seq LIMIT ? OFFSET ?", (limit, offset))
        return [_info(row) for row in rows]

    def chunk_texts(self, document_id: str) -> list[str] | None:
        """A document's chunk texts in order; None where there is no such document."""
        if self.info(document_id) is None:
            return None
        rows = self._sql.execute(
            "SELECT text FROM chunks JOIN documents ON document = seq WHERE id = ? ORDER BY ordinal",
            (document_id,),
        )
        return [text for (text,) in rows]

    def all_chunks(self) -> Iterator[tuple[DocumentInfo, list[Chunk]]]:
        """Every document with its chunks, in order of first arrival."""
        texts = self._sql.execute("SELECT text FROM chunks ORDER BY document, ordinal")
        for row in self._sql.execute(f"{_INFO} ORDER BY seq").fetchall():
            info = _info(row)
            yield (
                info,
                make_chunks(info, [text for (text,) in texts.fetchmany(info.chunks)] if info.chunks else []),
            )

    def totals(self) -> tuple[int, int, int]:
        """Documents, chunks, characters."""
        row = self._sql.execute(
            "SELECT count(*), coalesce(sum(chunks), 0), coalesce(sum(characters), 0) FROM documents"
        ).fetchone()
        return int(row[0]), int(row[1]), int(row[2])

    def _prepare(self) -> None:
        (application,) = self._sql.execute("PRAGMA application_id").fetchone()
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        (tables,) = self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != _APPLICATION_ID:
            raise CollectionError(f"{self.path} is not a ragkv collection; choose another folder", path=str(self.path))
        if version > _FORMAT:
            raise CollectionError(
                f"{self.path} has format {version}, this version reads up to {_FORMAT}; upgrade ragkv",
                path=str(self.path),
                format=version,
            )
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = NORMAL")
        self._sql.execute("PRAGMA foreign_keys = ON")
        if not tables:
            with self._transaction("BEGIN IMMEDIATE"):
                for statement in _SCHEMA.split(";"):
                    self._sql.execute(statement)
                self._sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._sql.execute(f"PRAGMA user_version = {_FORMAT}")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with self._lock, self._errors():
            self._sql.execute(begin)
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise CollectionError(f"{self.path}: {error}; {_advice(error)}", path=str(self.path)) from error


def make_chunks(info: DocumentInfo, texts: Sequence[str]) -> list[Chunk]:
    return [Chunk(chunk_id(info.id, i), info.id, i, text, info.metadata, info.title) for i, text in enumerate(texts)]


def _info(row: tuple[str, str | None, str, int, int]) -> DocumentInfo:
    return DocumentInfo(row[0], row[1], json.loads(row[2]), row[3], row[4])


def _advice(error: Exception) -> str:
    text = str(error)
    if "locked" in text:
        return "another process holds it; let that finish and try again"
    if "full" in text:
        return "free some disk space and try again"
    if "readonly" in text or "unable to open" in text:
        return "check that the folder exists and is writable"
    if "closed" in text:
        return "the collection was closed; open it again"
    if "I/O" in text:
        return "check that its disk is well and has space left, then try again"
    return "restore it from a backup, or delete the folder and add the documents again"
