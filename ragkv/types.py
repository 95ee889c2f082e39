"""What goes in and out of ragkv: requests, answers, reports, events. One definition for core, server and SDK.

Pydantic models, so that the same class validates a REST body, is printed by ``--json`` and is what the SDK
returns. Times are milliseconds, sizes bytes or tokens as the name says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ragkv.errors import InputError

Method = Literal["default", "none", "hkvd", "epic", "question", "echo", "links", "random", "full"]
ContextPolicy = Literal["document", "alone"]
RetrievalMode = Literal["fused", "bm25", "dense"]
FinishReason = Literal["stop", "length", "cancelled"]
KvSource = Literal["prefix", "device", "ram", "ssd", "remote", "computed", "dropped"]


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds lone surrogates, which are not text; send valid UTF-8") from error
    return text


Text = Annotated[str, AfterValidator(_valid)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DocumentIn(Wire):
    """A document as a caller sends it. Without an id, the id is derived from the content."""

    text: Text
    id: Text | None = None
    title: Text | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


DocumentLike = DocumentIn | Mapping[str, Any] | str
"""What callers may give for one: its fields, or its text alone."""


class Message(Wire):
    """One earlier turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Text


class ChatMessage(Wire):
    """One message of a chat. `system` messages stand first; the last message is the user's."""

    role: Literal["system", "user", "assistant"]
    content: Text


class GenerateRequest(Wire):
    """What every request may say: where its context comes from, how to answer it, and whose turn it is.

    Context comes from ``collection`` (retrieved, ``filters`` applied first) or from ``documents`` (the
    caller's own, best first), not both; with neither, the model answers from the conversation alone.
    ``None`` means: as configured.
    """

    collection: str | None = None
    documents: list[DocumentIn] | None = None
    filters: dict[str, Any] | None = None
    top_k: int | None = Field(default=None, ge=1, le=1000)
    retrieval: RetrievalMode | None = None
    method: Method | None = None
    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    context_policy: ContextPolicy | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=65536)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k_tokens: int = Field(default=0, ge=0, description="sample among this many tokens; 0 means all")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, description="drop tokens below this share of the best one's")
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=16)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="tell each token's, and of so many best ones")
    session_id: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="a conversation, whose KV, retrieved chunks included, is kept between its turns"
    )
    priority: int | None = Field(default=None, ge=-1000, le=1000, description="lower is sooner")


class QueryRequest(GenerateRequest):
    """A question. With a ``session_id``, the turns before it are the session's and ``history`` stays empty."""

    question: Text = Field(min_length=1)
    history: list[Message] = Field(default_factory=list)
    system: Text | None = None


class ChatRequest(GenerateRequest):
    """A conversation whose last message is to be answered. ``messages`` is all of it, with or without a session."""

    messages: list[ChatMessage] = Field(min_length=1)


Request = QueryRequest | ChatRequest


class Reply(BaseModel):
    """What ragkv answers. Unlike a request it may hold fields of a newer server that this SDK does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ChunkReport(Reply):
    """What happened to one chunk of the context, in prompt order (dropped chunks last)."""

    chunk_id: str
    document_id: str
    title: str | None
    text: str
    rank: int
    score: float
    tokens: int
    kv: KvSource = Field(
        description="where its KV came from; `computed`: prefilled here; `prefix`: it stood there already; `dropped`: "
        "left out"
    )
    why: str | None = Field(description="why it was computed or dropped, or was not repaired")
    context_tokens: int = Field(description="tokens of its own document its stored KV was encoded behind")
    position: int | None = Field(description="index of its first token in the prompt")
    repaired_tokens: int = Field(description="tokens recomputed in at least one layer")
    recomputed_token_layers: int


class Timing(Reply):
    """Where the time to first token went. The parts from ``retrieve`` to ``first_token`` add up to ``ttft_ms``.

    Loading overlaps computing: ``load_ms`` is only what the computation had to wait for. On a GPU the parts before
    ``first_token_ms`` are what they took the host, and that has what the device still had to do.
    """

    retrieve_ms: float
    plan_ms: float
    queue_ms: float
    lookup_ms: float
    load_ms: float
    select_ms: float
    recompute_ms: float
    first_token_ms: float
    ttft_ms: float
    total_ms: float


class Forecast(Reply):
    """What the controller expected of a prefill, and what it took; both from the choice to the first logits, without
    the time that others' work took in between.

    ``load`` is what computing waits for, as in :class:`Timing`. On a GPU all but the totals are the host's view.
    """

    way: Literal["full", "blend", "split"] = Field(description="`split`: some stored chunks were computed, not loaded")
    why: str
    full_ms: float = Field(description="predicted for a full prefill")
    blend_ms: float = Field(description="predicted for loading every stored chunk")
    load_ms: float
    select_ms: float
    recompute_ms: float
    total_ms: float
    actual_load_ms: float
    actual_select_ms: float
    actual_recompute_ms: float
    actual_total_ms: float


class Alternative(Reply):
    """A token that could have stood there."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(Alternative):
    """A token of an answer, natural logarithm of its probability, and the most probable ones in its place."""

    top: list[Alternative] = Field(default_factory=list)


class Usage(Reply):
    """Tokens of the request. ``cached_tokens``: prompt tokens that no layer computed, ``prefix_tokens`` of them
    because the KV of an earlier turn or of the same beginning was still there."""

    prompt_tokens: int
    context_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefix_tokens: int = 0


class Answer(Reply):
    """A finished request.

    ``recomputed_share`` = recomputed token-layers ÷ all context token-layers, the sum over ``chunks``.
    """

    id: str
    text: str
    finish_reason: FinishReason
    model: str
    method: Method
    ratio: float | None
    context_policy: ContextPolicy
    recomputed_share: float
    chunks: list[ChunkReport]
    warnings: list[str]
    timing: Timing
    usage: Usage
    forecast: Forecast | None = Field(default=None, description="the controller's prediction, where it chose")
    logprobs: list[TokenLogprob] | None = Field(default=None, description="of each token of the answer, if asked for")
    preemptions: int = Field(0, description="how often others took its place meanwhile")

    @property
    def sources(self) -> list[ChunkReport]:
        """The chunks the model saw."""
        return [c for c in self.chunks if c.kv != "dropped"]


class Source(Reply):
    """A chunk the answer rests on, as announced before the first token."""

    chunk_id: str
    document_id: str
    title: str | None
    text: str
    rank: int
    score: float


class SourcesEvent(Reply):
    """Sent once, first: what was retrieved and will be in the prompt."""

    type: Literal["sources"] = "sources"
    id: str
    sources: list[Source]


class TokenEvent(Reply):
    """A piece of the answer; the pieces joined are ``Answer.text``."""

    type: Literal["token"] = "token"
    text: str
    logprobs: list[TokenLogprob] | None = Field(default=None, description="of the tokens it is made of, if asked for")


class DoneEvent(Reply):
    """Sent once, last."""

    type: Literal["done"] = "done"
    answer: Answer


Event = SourcesEvent | TokenEvent | DoneEvent


class IngestEstimate(Reply):
    """What the KV of a corpus will take, said before any of it is computed.

    ``kv_bytes`` is the payload of all its chunks, ``new_kv_bytes`` of those not stored yet;
    ``encode_tokens`` is how many tokens the model must prefill for them, document context included.
    """

    documents: int
    chunks: int
    tokens: int
    kv_bytes: int
    new_kv_bytes: int
    encode_tokens: int
    capacity_bytes: int


class RejectedDocument(Reply):
    document_id: str
    error: str
    message: str


class IngestReport(Reply):
    """What an ingest did. ``encoded`` chunks were computed now, ``reused`` were stored already,
    ``deferred`` will be encoded at first use (lazy ingest)."""

    collection: str
    added: int
    replaced: int
    unchanged: int
    rejected: list[RejectedDocument]
    chunks: int
    encoded: int
    reused: int
    deferred: int
    kv_bytes_written: int
    seconds: float
    warnings: list[str]


class DocumentInfo(Reply):
    id: str
    title: str | None
    metadata: dict[str, Any]
    chunks: int
    characters: int


class DocumentOut(DocumentInfo):
    text: str


class CollectionInfo(Reply):
    name: str
    documents: int
    chunks: int


class RemoteInfo(Reply):
    """The remote tier as this process sees it: ``breaker`` is `closed` (in use), `open` or `half-open`."""

    name: str
    breaker: str
    errors: int
    corrupt: int
    bytes_in: int
    bytes_out: int
    promotions: int
    promotions_dropped: int
    writebacks: int
    writebacks_dropped: int
    writebacks_waiting_bytes: int
    deletes_failed: int


class StoreInfo(Reply):
    """The chunk store's state. What is in RAM, and counts of events, are the answering process's own."""

    path: str
    policy: str = Field(description="who makes room on disk: `cost`, `s3-fifo` or `lru`")
    entries: int
    bytes: int
    capacity_bytes: int
    ram_entries: int
    ram_bytes: int
    ram_capacity_bytes: int
    hits_ram: int
    hits_ssd: int
    hits_remote: int
    misses: int
    corrupt: int
    evictions: int
    entries_by_model: dict[str, int]
    session_bytes: int = Field(0, description="KV of idle conversations on disk, beside the store")
    remote: RemoteInfo | None = Field(None, description="the remote tier, if there is one")


class StoreCheck(Reply):
    """What ``ragkv cache check`` found (and repaired, with ``--fix``)."""

    entries: int
    orphan_files: int
    missing_files: int
    corrupt_entries: int
    miscounted_entries: int
    foreign_entries: int = Field(description="sound, and for another version of ragkv: they stay")
    tables_sound: bool = Field(description="whether the order of eviction and the tallies agreed with the entries")
    fixed: bool
    ok: bool


class Health(Reply):
    """``status`` is `ok`, `degraded` (blending is off: see ``blending``) or `failed` (the engine is dead)."""

    status: Literal["ok", "degraded", "failed"]
    version: str
    model: str
    device: str
    dtype: str
    blending: str = Field(description="`on`, or the reason why every prompt is prefilled in full")
    layer_loop: str = Field(description="`fused` (CUDA kernels), or `plain: ` and the reason; answers are the same")
    calibrated: bool = Field(False, description="method, ratio and codec are as `ragkv calibrate` measured this model")
    calibration: str = Field("", description="what it measured, or why the setting counts as not calibrated")
    running: int
    queued: int
    encoding: int = Field(description="chunks waiting to be encoded in the background")


D = TypeVar("D")
M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], data: Any, name: str = "") -> M:
    """``data``, which errors call ``name``, as a ``model``.

    Raises:
        InputError: a field is unknown, missing or out of range; names each.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        root = [name] if name else []
        problems = [f"{'.'.join(map(str, (*root, *e['loc']))) or model.__name__}: {e['msg']}" for e in error.errors()]
        raise InputError("; ".join(problems)) from error


def make_request(question: str | Request, fields: Mapping[str, Any]) -> Request:
    """The request that a question, or a request, and more fields make. Raises InputError naming a bad field."""
    if isinstance(question, GenerateRequest):
        return validated(type(question), question.model_dump(exclude_unset=True) | dict(fields))
    return validated(QueryRequest, {"question": question, **fields})


def each_document(documents: Iterable[D]) -> Iterator[tuple[str, D]]:
    """Documents as a caller lists them, each with what errors call it. Raises InputError where they are no list."""
    if isinstance(documents, str | Mapping) or not isinstance(documents, Iterable):
        raise InputError(f"documents must be a list, not {type(documents).__name__}; put a single one into a list")
    for number, document in enumerate(documents):
        yield f"documents[{number}]", document


def document_in(given: DocumentLike, name: str) -> DocumentIn:
    """A document from its fields, or its text alone. Raises InputError with ``name`` and what is wrong."""
    if isinstance(given, DocumentIn):
        return given
    fields = {"text": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else given
    return validated(DocumentIn, fields, name)
