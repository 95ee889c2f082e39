"""A user's documents in a folder of their own: retrieved, planned and encoded as when they are served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokenizer, EncodeGroup
from ragkv.clock import Stopwatch
from ragkv.config import Settings
from ragkv.encode import encode
from ragkv.engine import context_room
from ragkv.eval.probes import Probe
from ragkv.eval.steps import drained
from ragkv.pipeline import Pipeline
from ragkv.plan import PromptPlan
from ragkv.retrievers import Catalog, Chunk, Document, Splitter
from ragkv.sessions import Sessions
from ragkv.store import ChunkStore
from ragkv.types import make_request

_NAME = "calibration"
_PAGE = 1000
Say = Callable[[str, int, int], None]


class Corpus:
    """Documents, their chunks and what is stored of them under several codecs. Close it, or use it as a context.

    Args:
        folder: new, for collection and store.
        room: tokens that prompts leave for answers.
    """

    def __init__(self, settings: Settings, checkpoint: Checkpoint, folder: Path, *, room: int) -> None:
        self._settings, self._checkpoint, self._room = settings, checkpoint, room
        tokenizer = checkpoint.tokenizer
        self._splitter = Splitter(
            tokenizer.count,
            settings.chunk_tokens,
            count_batch=tokenizer.count_many,
            tokenizer=tokenizer.fingerprint,
        )
        self._catalog = Catalog(folder / "collections", self._splitter, embedder=settings.embedder)
        self._collection = self._catalog.create(_NAME)
        self._ways: dict[str, tuple[ChunkTokenizer, Pipeline]] = {}
        self.store = ChunkStore(folder / "store", capacity_bytes=settings.store_bytes, ram_bytes=settings.ram_bytes)

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self._catalog.close()

    def add(self, documents: Sequence[Document], say: Say) -> None:
        """Raises DocumentError."""
        self._collection.add(documents, lambda done: say("split", done, len(documents)))
        say("index", 0, 1)
        self._collection.refresh()
        say("index", 1, 1)

    def chunks(self) -> list[Chunk]:
        """All chunks, document by document."""
        count = len(self._collection)
        infos = [info for at in range(0, count, _PAGE) for info in self._collection.documents(at, _PAGE)]
        return [chunk for info in infos for chunk in self._collection.chunks(info.id)]

    def plan(self, probe: Probe, codec: str) -> PromptPlan:
        """The prompt of ``probe`` over what is retrieved for it, with the keys of chunks stored with ``codec``.

        Raises:
            InputError: it cannot be asked; PromptTooLongError: it is too long.
        """
        request = make_request(probe.question, {"collection": _NAME, "max_tokens": self._room})
        plan = self._way(codec)[1].prepare(request, Stopwatch()).plan
        return replace(plan, ids=(*plan.ids[: plan.question_start], *probe.ids)) if probe.ids else plan

    def encode(self, plans: Iterable[PromptPlan], codec: str, say: Say | None = None) -> None:
        """Store what is lacking of the chunks of ``plans``.

        Raises:
            StoreFullError: it does not fit.
        """
        wanted = {span.chunk.tokens.key: span.chunk.chunk.document_id for plan in plans for span in plan.spans}
        infos = self.store.lookup(list(wanted))
        missing = {key: wanted[key] for key, info in zip(wanted, infos, strict=True) if info is None}
        groups = self._groups(missing, codec)
        for number, group in enumerate(groups):
            self._store_group(group, codec)
            if say:
                say("encode", number + 1, len(groups))

    def _groups(self, missing: dict[bytes, str], codec: str) -> list[EncodeGroup]:
        tokenizer, groups, keys = self._way(codec)[0], list[EncodeGroup](), set(missing)
        for document in dict.fromkeys(missing.values()):
            texts = [chunk.text for chunk in self._collection.chunks(document)]
            groups += tokenizer.groups(tokenizer.document(texts, self._settings.context_policy), keys)
        return groups

    def _store_group(self, group: EncodeGroup, codec: str) -> None:
        runner = self._checkpoint.runner
        for chunk in drained(encode(runner, group)):
            self.store.put(
                chunk.key,
                runner.shape.geometry,
                chunk.slabs,
                tokens=chunk.tokens,
                model=self._checkpoint.name,
                codec=codec,
                context_tokens=chunk.context_tokens,
                context_policy=chunk.context_policy,
            )

    def _way(self, codec: str) -> tuple[ChunkTokenizer, Pipeline]:
        if codec not in self._ways:
            checkpoint, settings = self._checkpoint, self._settings
            tokenizer = ChunkTokenizer(
                checkpoint.tokenizer,
                model_fingerprint=checkpoint.model_fingerprint,
                dtype=checkpoint.runner.shape.geometry.dtype,
                context_tokens=context_room(settings, checkpoint.runner.max_positions),
                codec=codec,
            )
            pipeline = Pipeline(checkpoint, self._catalog, self._splitter, tokenizer, settings, Sessions())
            self._ways[codec] = tokenizer, pipeline
        return self._ways[codec]
