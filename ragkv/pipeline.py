"""A question's way to a prompt: retrieve, tokenise, plan."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokenizer
from ragkv.clock import Stopwatch
from ragkv.config import Settings
from ragkv.documents import checked, to_document
from ragkv.errors import InputError, NotFoundError
from ragkv.lineage import Lineage
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.retrievers import Catalog, Chunk, Hit, Splitter
from ragkv.sessions import Session, Sessions
from ragkv.tokenizer import question_text
from ragkv.types import ChatRequest, ContextPolicy, DocumentIn, Message, Method, QueryRequest, Request

# What `default` means until a calibration on the user's own model and documents says better; see docs/blending.md.
DEFAULT_STRATEGY: Method = "links"


def resolve_method(method: Method) -> Method:
    """The strategy a method name stands for."""
    return DEFAULT_STRATEGY if method == "default" else method


class Conversation(NamedTuple):
    """What was said: the system text, the turns before, and what is to be answered; ``prompt`` is its text for the
    model. ``session`` holds the turns before, where they are remembered."""

    system: str
    history: tuple[Message, ...]
    last: str
    prompt: str
    session: Session | None = None


@dataclass(frozen=True)
class Prepared:
    """A request with everything decided but the answer. ``as_asked``: the request itself names a method."""

    request: Request
    conversation: Conversation
    tenant: str
    lineage: Lineage
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
        sessions: Sessions,
    ) -> None:
        self._checkpoint, self._catalog, self._splitter = checkpoint, catalog, splitter
        self._chunk_tokenizer, self._settings, self._sessions = chunk_tokenizer, settings, sessions

    def prepare(self, request: Request, watch: Stopwatch, tenant: str = "") -> Prepared:
        """Retrieve and plan.

        Raises:
            InputError, NotFoundError, FilterError, PromptTooLongError: the request cannot be answered.
        """
        settings = self._settings
        policy = request.context_policy or settings.context_policy
        method = request.method or settings.method
        max_tokens = request.max_tokens or settings.max_tokens
        conversation = self._conversation(request, tenant)
        hits, siblings = self._context(request, conversation.last)
        watch.lap("retrieve")
        chunks = self._planned(hits, siblings, policy)
        session, tokenizer = conversation.session, self._checkpoint.tokenizer
        prefix, suffix = tokenizer.frame(conversation.system, conversation.history)
        if session is not None:
            prefix = (*session.ids, *tokenizer.between(conversation.system))
        question = (*tokenizer.plain(conversation.prompt), *suffix)
        budget = self._checkpoint.runner.max_positions - max_tokens
        plan = make_plan(prefix, chunks, question, budget=budget, standing=session.chunks if session else ())
        watch.lap("plan")
        return Prepared(
            request=request,
            conversation=conversation,
            tenant=tenant,
            lineage=session.lineage if session else self._lineage(request, tenant),
            plan=plan,
            strategy=resolve_method(method),
            ratio=settings.ratio if request.ratio is None else request.ratio,
            policy=policy,
            max_tokens=max_tokens,
            warnings=_warnings(request, hits, plan),
            as_asked=_names_method(request),
        )

    def _lineage(self, request: Request, tenant: str) -> Lineage:
        """A request that names a method gets just that, so it may not find what another one has computed."""
        return Lineage(secrets.token_bytes(16) if _names_method(request) else tenant.encode())

    def remember(self, prepared: Prepared, lineage: Lineage, answer: str, ids: Sequence[int]) -> None:
        """Keep a conversation that has a name for its next turn, with the ``ids`` of its ``answer``."""
        name, said = prepared.request.session_id, prepared.conversation
        if name is None:
            return
        before = said.session.chunks if said.session else frozenset()
        session = Session(
            system=said.system,
            turns=(*said.history, Message(role="user", content=said.last), Message(role="assistant", content=answer)),
            ids=(*prepared.plan.ids, *ids),
            lineage=lineage,
            chunks=before.union(span.chunk.tokens.key for span in prepared.plan.spans),
        )
        self._sessions.put(prepared.tenant, name, session)

    def _conversation(self, request: Request, tenant: str) -> Conversation:
        session = self._sessions.get(tenant, request.session_id) if request.session_id is not None else None
        said = self._chat(request) if isinstance(request, ChatRequest) else self._asked(request, session)
        if session is not None and (session.system, session.turns) == (said.system, said.history):
            return said._replace(session=session)
        return said

    def _asked(self, request: QueryRequest, session: Session | None) -> Conversation:
        if not request.question.strip():
            raise InputError("the question is blank; ask something")
        if request.session_id is not None and request.history:
            raise InputError("give `session_id` or `history`, not both: a session has its own history")
        system = self._settings.system_prompt if request.system is None else request.system
        history = session.turns if session else tuple(request.history)
        return Conversation(system, history, request.question, question_text(request.question))

    def _chat(self, request: ChatRequest) -> Conversation:
        """With context the last message is asked like a query's question; without a system message, the configured one
        says what the documents are for."""
        leading = next((i for i, m in enumerate(request.messages) if m.role != "system"), len(request.messages))
        turns = request.messages[leading:]
        if any(message.role == "system" for message in turns):
            raise InputError("`messages`: system messages stand before all others")
        if not turns or turns[-1].role != "user":
            raise InputError("`messages`: the last one must be the user's; it is what gets answered")
        if not turns[-1].content.strip():
            raise InputError("`messages`: the last one is blank; ask something")
        history = tuple(Message(role=m.role, content=m.content) for m in turns[:-1] if m.role != "system")
        system = "\n\n".join(message.content for message in request.messages[:leading])
        last = turns[-1].content
        if request.collection is None and request.documents is None:
            return Conversation(system, history, last, last)
        return Conversation(system if leading else self._settings.system_prompt, history, last, question_text(last))

    def _context(self, request: Request, question: str) -> tuple[list[Hit], dict[str, list[Chunk]]]:
        """Hits, best first, and all chunks of their documents in order."""
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
            question,
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


def _names_method(request: Request) -> bool:
    return request.method not in (None, "default")


def _warnings(request: Request, hits: Sequence[Hit], plan: PromptPlan) -> tuple[str, ...]:
    warnings = []
    if request.collection is not None and not hits:
        warnings.append(f"nothing in {request.collection!r} matches the question; answered without documents")
    if plan.dropped:
        warnings.append(
            f"{len(plan.dropped)} of {len(hits)} chunks did not fit the model's context and were dropped, "
            "lowest-ranked first"
        )
    return tuple(warnings)
