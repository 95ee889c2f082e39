"""The body of ``POST /v1/chat/completions``: OpenAI's fields, ragkv's own, and the ChatRequest they make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from ragkv.errors import InputError
from ragkv.server.errors import invalid
from ragkv.types import ChatMessage, ChatRequest, DocumentIn, Method, Text, Wire

# What clients send that asks for nothing, next to null. Any other value is refused: it would be ignored silently.
_ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What a ChatRequest calls differently: here top_k is what other servers of OpenAI's API make of it.
_NAMES = {
    "top_k": "rag_top_k",
    "top_k_tokens": "top_k",
    "logprobs": "top_logprobs",
}
_ROLES = {"developer": "system"}
_PASSED = frozenset(ChatRequest.model_fields) - {"messages", *_NAMES}


def _joined(content: object) -> object:
    """Content that comes in parts, as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(f"holds a part of type {kind!r}; this server reads text parts only")
    return "\n".join(part["text"] for part in content)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _documents(documents: object) -> object:
    if not isinstance(documents, list):
        return documents
    return [{"text": document} if isinstance(document, str) else document for document in documents]


class ChatTurn(Wire):
    """One message. What else OpenAI's answers hold may be sent back, as long as it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatBody(Wire):
    """A chat as OpenAI's clients send it, and ragkv's extras (``extra_body`` there). Null means: left out.

    Ranges are those of ChatRequest. ``user``, ``safety_identifier`` and ``prompt_cache_key`` are read and change
    nothing.
    """

    model: str
    messages: list[ChatTurn] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Annotated[list[str], BeforeValidator(_listed)] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    documents: Annotated[list[DocumentIn], BeforeValidator(_documents)] | None = None
    collection: str | None = None
    filters: dict[str, Any] | None = None
    rag_top_k: int | None = Field(default=None, description="chunks to retrieve")
    method: Method | None = None
    ratio: float | None = None
    session_id: str | None = None
    priority: int | None = None
    top_k: int | None = Field(default=None, description="sample among this many tokens; 0 means all")
    min_p: float | None = None
    repetition_penalty: float | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    metadata: Any = None
    modalities: Any = None
    n: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @field_validator(*_ASKS_FOR_NOTHING)
    @classmethod
    def _unsupported(cls, value: object, info: ValidationInfo) -> object:
        allowed = _ASKS_FOR_NOTHING[info.field_name or ""]
        if value is not None and value not in allowed:
            raise ValueError("not supported by this server; leave it out")
        return value

    @property
    def usage_asked(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def request(self) -> ChatRequest:
        """What the engine is asked. Raises InputError naming the fields, as the caller knows them, that are wrong."""
        self._refuse_contradictions()
        sent = {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}
        fields = {name: value for name, value in sent.items() if name in _PASSED}
        fields |= {name: sent[called] for name, called in _NAMES.items() if called in sent}
        names = dict(_NAMES)
        if "max_completion_tokens" in sent:
            fields["max_tokens"] = sent["max_completion_tokens"]
            names["max_tokens"] = "max_completion_tokens"
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        fields.setdefault("temperature", 1.0)  # OpenAI's default, not ours
        try:
            return ChatRequest.model_validate(fields | {"messages": _messages(self.messages)})
        except ValidationError as error:
            raise invalid(error, names) from error

    def _refuse_contradictions(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "needs 'logprobs': true")
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "needs 'stream': true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "differs from max_completion_tokens, its newer name; send one of them")


def _messages(turns: Iterable[ChatTurn]) -> list[ChatMessage]:
    """The conversation behind its one system text: several are joined, wherever they stood."""
    messages = [ChatMessage(role=_ROLES.get(turn.role, turn.role), content=turn.content) for turn in turns]  # type: ignore[arg-type]
    system = [message.content for message in messages if message.role == "system"]
    first = [ChatMessage(role="system", content="\n\n".join(system))] if system else []
    return first + [message for message in messages if message.role != "system"]


def _wrong(field: str, problem: str) -> InputError:
    return InputError(f"{field}: {problem}", errors=[{"field": field, "problem": problem}])
