"""Every question of a file through a running server, streamed, and every report checked."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from ragkv.client import Client
from ragkv.errors import RagkvError
from ragkv.eval.questions import QuestionFile
from ragkv.types import Answer, DoneEvent, SourcesEvent, TokenEvent


def replay(
    file: QuestionFile, client: Client, collection: str, *, fields: dict[str, Any], say: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Ask everything once; says how it went. ``faults`` lists what failed or did not add up."""
    answers: list[Answer] = []
    faults: list[str] = []
    for number, asked in enumerate(file.questions):
        say("ask", number, len(file.questions))
        try:
            answer, text = _stream(client, asked.question, collection, fields)
        except RagkvError as error:
            faults.append(f"question {number}: {error.code}: {error.message}")
            continue
        answers.append(answer)
        faults += [f"question {number}: {fault}" for fault in check_report(answer, text)]
    say("ask", len(file.questions), len(file.questions))
    kv = Counter(chunk.kv for answer in answers for chunk in answer.chunks)
    return {
        "questions": len(file.questions),
        "answered": len(answers),
        "faults": faults,
        "chunks": dict(kv),
        "median_ttft_ms": statistics.median(a.timing.ttft_ms for a in answers) if answers else None,
        "median_context_tokens": statistics.median(a.usage.context_tokens for a in answers) if answers else None,
        "mean_recomputed_share": statistics.fmean(a.recomputed_share for a in answers) if answers else None,
    }


def check_report(answer: Answer, text: str) -> list[str]:
    """What in an answer's report does not add up; ``text`` is what was streamed."""
    chunks, usage, timing = answer.sources, answer.usage, answer.timing
    faults = []
    if text != answer.text:
        faults.append(f"streamed {text!r}, answered {answer.text!r}")
    if sum(chunk.tokens for chunk in chunks) != usage.context_tokens:
        faults.append("the chunks' tokens do not add up to context_tokens")
    untouched = sum(chunk.tokens - chunk.repaired_tokens for chunk in chunks if chunk.kv != "prefix")
    if usage.prefix_tokens + untouched != usage.cached_tokens:
        faults.append("the known beginning and the chunks' untouched tokens do not add up to cached_tokens")
    if any(chunk.kv == "computed" and not chunk.why for chunk in answer.chunks):
        faults.append("a computed chunk gives no reason")
    parts = (
        timing.retrieve_ms,
        timing.plan_ms,
        timing.queue_ms,
        timing.lookup_ms,
        timing.load_ms,
        timing.select_ms,
        timing.recompute_ms,
        timing.first_token_ms,
    )
    if not math.isclose(sum(parts), timing.ttft_ms, abs_tol=0.1):
        faults.append(f"the parts of the time to first token give {sum(parts):.1f}, not {timing.ttft_ms:.1f} ms")
    return faults


def _stream(client: Client, question: str, collection: str, fields: dict[str, Any]) -> tuple[Answer, str]:
    text, announced = "", False
    for event in client.stream(question, collection=collection, **fields):
        if isinstance(event, SourcesEvent):
            announced = True
        elif isinstance(event, TokenEvent):
            text += event.text
        elif isinstance(event, DoneEvent) and announced:
            return event.answer, text
    raise RagkvError("the stream ended without `sources` or `done`")
