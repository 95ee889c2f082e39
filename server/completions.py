"""Answers in OpenAI's shapes: the chat completion, its chunks, and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Any

from ragkv.errors import CancelledError
from ragkv.server.errors import as_json, openai_body
from ragkv.types import Alternative, Answer, DoneEvent, Event, SourcesEvent, TokenEvent, TokenLogprob, Usage

_OPENAI_HAS = {"id", "text", "finish_reason", "model", "usage", "logprobs"}


def completion(answer: Answer) -> dict[str, Any]:
    """A finished answer. Raises CancelledError when somebody ended it: OpenAI's has no word for that."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": _logprobs(answer.logprobs),
        "finish_reason": _finish_reason(answer),
    }
    head = {"id": answer.id, "object": "chat.completion", "created": int(time()), "model": answer.model}
    return head | {"choices": [choice], "usage": _usage(answer.usage), "ragkv": _report(answer)}


class Chunks:
    """A streamed answer's chunks: the role, pieces of text, the ``finish_reason``, and the usage if it is asked for."""

    def __init__(self, model: str, *, usage: bool) -> None:
        self._head = {"id": "", "object": "chat.completion.chunk", "created": int(time()), "model": model}
        self._usage = usage

    def say(self, event: Event) -> bytes:
        if isinstance(event, SourcesEvent):
            self._head["id"] = event.id
            return self._chunk({"role": "assistant", "content": "", "refusal": None})
        if isinstance(event, TokenEvent):
            return self._chunk({"content": event.text}, logprobs=_logprobs(event.logprobs))
        return self._last(event)

    def fail(self, error: Exception) -> bytes:
        return _data(openai_body(error))

    def _last(self, event: DoneEvent) -> bytes:
        answer = event.answer
        last = self._chunk({}, finish_reason=_finish_reason(answer), ragkv=_report(answer))
        if self._usage:
            last += _data(as_json(self._head | {"choices": [], "usage": _usage(answer.usage)}))
        return last + _data(b"[DONE]")

    def _chunk(self, delta: dict[str, Any], ragkv: dict[str, Any] | None = None, **choice: Any) -> bytes:
        told = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | choice
        more = ({"usage": None} if self._usage else {}) | ({"ragkv": ragkv} if ragkv else {})
        return _data(as_json(self._head | {"choices": [told]} | more))


def _data(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _finish_reason(answer: Answer) -> str:
    if answer.finish_reason == "cancelled":
        raise CancelledError("the request was cancelled before its answer was complete", request_id=answer.id)
    return answer.finish_reason


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _report(answer: Answer) -> dict[str, Any]:
    """What only ragkv tells: what the answer rests on, what became of every chunk, where the time went."""
    sources = [
        chunk.model_dump(include={"chunk_id", "document_id", "title", "rank", "score"}) for chunk in answer.sources
    ]
    return {"sources": sources, **answer.model_dump(mode="json", exclude=_OPENAI_HAS)}


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = [_token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: Alternative) -> dict[str, Any]:
    # A token may end within a character; its bytes are then not in the text.
    whole = "\ufffd" not in token.text
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()) if whole else None}
