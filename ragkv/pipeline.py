"""A question's way to a prompt: retrieve, tokenise, plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokenizer
from ragkv.clock import Stopwatch
from ragkv.config import Settings
from ragkv.documents import checked, to_document
from ragkv.errors import InputError, NotFoundError
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.retrievers import Catalog, Chunk, Hit, Splitter
from ragkv.tokenizer import question_text
from ragkv.types import ContextPolicy, DocumentIn, Method, QueryRequest

# What `default` means until a calibration on the user's own model and documents says better; see docs/blending.md.
DEFAULT_STRATEGY: Method = "links"


def resolve_method(method: Method) -> Method:
    """The strategy a method name stands for."""
    return DEFAULT_STRATEGY if method == "default" else method


@dataclass(frozen=True)
class Prepared:
    """A request with everything decided but the answer. ``as_asked``: the request itself names a method."""

    request: QueryRequest
    plan: PromptPlan
    strategy: Method
    ratio: float
    policy: ContextPolicy
    max_tokens: int
    warnings: tuple[str, ...]
    as_asked: bool


class Pipeline:
    """Prepares requests. Thread-safe: callers' threads run it, never the engine thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        catalog: Catalog,
        splitter: Splitter,
        chunk_tokenizer: ChunkTokenizer,
        settings: Settings,
    ) -> None:
        self._checkpoint, self._catalog, self._splitter = checkpoint, catalog, splitter
        self._chunk_tokenizer, self._settings = chunk_tokenizer, settings

    def prepare(self, request: QueryRequest, watch: Stopwatch) -> Prepared:
        """Retrieve and plan.

        Raises:
            InputError, NotFoundError, FilterError, PromptTooLongError: the request cannot be answered.
        """
        settings = self._settings
        policy = request.context_policy or settings.context_policy
        method = request.method or settings.method
        max_tokens = request.max_tokens or settings.max_tokens
        hits, siblings = self._context(request)
        watch.lap("retrieve")
        chunks = self._planned(hits, siblings, policy)
        prefix, suffix = self._frame(request)
        question = (*self._checkpoint.tokenizer.plain(question_text(request.question)), *suffix)
        budget = self._checkpoint.runner.max_positions - max_tokens
        plan = make_plan(prefix, chunks, question, budget=budget)
        watch.lap("plan")
        return Prepared(
            request=request,
            plan=plan,
            strategy=resolve_method(method),
            ratio=settings.ratio if request.ratio is None else request.ratio,
            policy=policy,
            max_tokens=max_tokens,
            warnings=_warnings(request, hits, plan),
            as_asked=request.method not in (None, "default"),
        )

    def _frame(self, request: QueryRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        system = self._settings.system_prompt if request.system is None else request.system
        return self._checkpoint.tokenizer.frame(system, request.history)

    def _context(self, request: QueryRequest) -> tuple[list[Hit], dict[str, list[Chunk]]]:
        """Hits, best first, and all chunks of their documents in order."""
        if not request.question.strip():
            raise InputError("the question is blank; ask something")
        if request.collection is not None and request.documents is not None:
            raise InputError("give `collection` or `documents`, not both")
        if request.filters is not None and request.collection is None:
            raise InputError("`filters` need a `collection` to filter")
        if request.documents is not None:
            return self._supplied(request.documents)
        if request.collection is None:
            return [], {}
        collection = self._catalog.open(request.collection)
        hits = collection.retrieve(
            request.question,
            request.top_k or self._settings.top_k,
            mode=request.retrieval or self._settings.retrieval,
            filters=request.filters,
        )
        siblings: dict[str, list[Chunk]] = {}
        for document_id in {hit.chunk.document_id for hit in hits}:
            with suppress(NotFoundError):  # deleted between retrieval and here
                siblings[document_id] = collection.chunks(document_id)
        return [hit for hit in hits if hit.chunk.document_id in siblings], siblings

    def _supplied(self, documents: Sequence[DocumentIn]) -> tuple[list[Hit], dict[str, list[Chunk]]]:
        siblings: dict[str, list[Chunk]] = {}
        hits: list[Hit] = []
        for given in documents:
            document = checked(to_document(given), max_bytes=self._settings.max_document_bytes)
            if document.id in siblings:
                raise InputError(f"two of the documents have the id {document.id!r}", document_id=document.id)
            siblings[document.id] = self._splitter.split_document(document)
            hits += [
                Hit(chunk, 1.0 / (len(hits) + i + 1), len(hits) + i + 1)
                for i, chunk in enumerate(siblings[document.id])
            ]
        return hits, siblings

    def _planned(
        self, hits: Sequence[Hit], siblings: dict[str, list[Chunk]], policy: ContextPolicy
    ) -> list[PlannedChunk]:
        planned = []
        for hit in hits:
            texts = [chunk.text for chunk in siblings[hit.chunk.document_id]]
            # A document replaced between retrieval and here may no longer have the chunk that was found.
            if texts[hit.chunk.ordinal : hit.chunk.ordinal + 1] == [hit.chunk.text]:
                tokens = self._chunk_tokenizer.chunk(texts, hit.chunk.ordinal, policy)
                planned.append(PlannedChunk(hit.chunk, hit.rank, hit.score, tokens))
        return planned


def _warnings(request: QueryRequest, hits: Sequence[Hit], plan: PromptPlan) -> tuple[str, ...]:
    warnings = []
    if request.collection is not None and not hits:
        warnings.append(f"nothing in {request.collection!r} matches the question; answered without documents")
    if plan.dropped:
        warnings.append(
            f"{len(plan.dropped)} of {len(hits)} chunks did not fit the model's context and were dropped, "
            "lowest-ranked first"
        )
    return tuple(warnings)
