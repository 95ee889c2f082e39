"""From the engine's tokens to the caller's events, off the engine thread.

One thread detokenises for all requests; it watches for stop strings and, at the end, writes the report.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from ragkv.checkpoint import Checkpoint
from ragkv.detokenize import Detokenizer
from ragkv.generation import Generation, TokenScores
from ragkv.lineage import Lineage
from ragkv.methods import parameters
from ragkv.pipeline import Prepared
from ragkv.plan import PlannedChunk, Span
from ragkv.prefill import SpanOutcome
from ragkv.types import (
    Alternative,
    Answer,
    ChunkReport,
    DoneEvent,
    Event,
    FinishReason,
    KvSource,
    Source,
    SourcesEvent,
    Timing,
    TokenEvent,
    TokenLogprob,
    Usage,
)

log = logging.getLogger("ragkv")
Emit = Callable[[Event | Exception], None]
Remember = Callable[[Prepared, Lineage, str, Sequence[int]], None]


class OutputThread:
    """Runs posted calls one after the other."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ragkv-output", daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def close(self) -> None:
        """Run what was posted, then end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                log.exception("delivering an event failed")


class Delivery:
    """Events of one request: ``sources``, then ``token`` …, then ``done``, or an exception in place of the rest."""

    def __init__(
        self,
        prepared: Prepared,
        detokenizer: Detokenizer,
        checkpoint: Checkpoint,
        output: OutputThread,
        emit: Emit,
        remember: Remember,
    ) -> None:
        self._prepared, self._detokenizer, self._checkpoint = prepared, detokenizer, checkpoint
        self._output, self._emit, self._remember = output, emit, remember
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._unsaid: list[TokenLogprob] = []
        self.generation: Generation | None = None

    def announce(self) -> None:
        self._output.post(self._announce)

    def on_token(self, token: int, scores: TokenScores | None = None) -> None:
        self._output.post(lambda: self._token(token, scores))

    def on_finish(self, reason: FinishReason) -> None:
        self._output.post(lambda: self._finish(reason))

    def on_error(self, error: Exception) -> None:
        self._output.post(lambda: self._emit(error))

    def _announce(self) -> None:
        plan = self._prepared.plan
        sources = [_source(chunk) for chunk in (*(span.chunk for span in plan.spans), *plan.standing)]
        self._emit(SourcesEvent(id=self._begun().id, sources=sources))

    def _begun(self) -> Generation:
        if self.generation is None:
            raise RuntimeError("nothing was generated for this delivery")
        return self.generation

    def _token(self, token: int, scores: TokenScores | None) -> None:
        if self._detokenizer.stopped:
            return
        self._ids.append(token)
        if scores is not None:
            self._unsaid.append(self._told(token, scores))
        self._say(self._detokenizer.push(token))
        if self._detokenizer.stopped:
            self._begun().stop.set()

    def _told(self, token: int, scores: TokenScores) -> TokenLogprob:
        tokenizer = self._checkpoint.tokenizer
        top = [Alternative(token_id=i, text=tokenizer.decode([i]), logprob=value) for i, value in scores.top]
        return TokenLogprob(token_id=token, text=tokenizer.decode([token]), logprob=scores.logprob, top=top)

    def _say(self, text: str) -> None:
        if text:
            self._emit(TokenEvent(text=text, logprobs=self._unsaid or None))
            self._logprobs += self._unsaid
            self._unsaid = []

    def _finish(self, reason: FinishReason) -> None:
        self._say(self._detokenizer.finish())
        cut = self._detokenizer.stopped or reason == "cancelled"
        reason = "stop" if self._detokenizer.stopped else reason
        generation, text = self._begun(), self._detokenizer.text
        # Where the text ends before the tokens do, the next turn must see what was said.
        ids = self._checkpoint.tokenizer.plain(text) if cut else self._ids
        self._remember(self._prepared, generation.lineage, text, ids)
        self._emit(DoneEvent(answer=self._answer(generation, reason)))

    def _answer(self, generation: Generation, reason: FinishReason) -> Answer:
        prepared, plan = self._prepared, self._prepared.plan
        chunks = [_report(span, outcome) for span, outcome in zip(plan.spans, generation.outcomes, strict=False)]
        context = plan.context_tokens
        recomputed = sum(chunk.recomputed_token_layers for chunk in chunks)
        return Answer(
            id=generation.id,
            text=self._detokenizer.text,
            finish_reason=reason,
            model=self._checkpoint.name,
            method=prepared.strategy,
            ratio=prepared.ratio if "ratio" in parameters(prepared.strategy) else None,
            context_policy=prepared.policy,
            recomputed_share=recomputed / (context * self._checkpoint.runner.shape.layers) if context else 0.0,
            chunks=[*chunks, *map(_standing, plan.standing), *map(_dropped, plan.dropped)],
            warnings=list(prepared.warnings),
            timing=_timing(generation),
            forecast=generation.forecast,
            usage=Usage(
                prompt_tokens=len(plan.ids),
                context_tokens=context,
                cached_tokens=generation.known_tokens
                + sum(c.tokens - c.repaired_tokens for c in chunks if c.kv != "prefix"),
                completion_tokens=len(self._ids),
                prefix_tokens=generation.known_tokens,
            ),
            logprobs=[*self._logprobs, *self._unsaid] if prepared.request.logprobs is not None else None,
            preemptions=generation.preemptions,
        )


def _source(chunk: PlannedChunk) -> Source:
    return Source(
        chunk_id=chunk.chunk.id,
        document_id=chunk.chunk.document_id,
        title=chunk.chunk.title,
        text=chunk.chunk.text,
        rank=chunk.rank,
        score=chunk.score,
    )


def _report(span: Span, outcome: SpanOutcome) -> ChunkReport:
    return ChunkReport(
        **_source(span.chunk).model_dump(),
        tokens=span.length,
        kv=outcome.kv,
        why=outcome.why,
        context_tokens=len(span.chunk.tokens.context),
        position=span.start,
        repaired_tokens=outcome.repaired_tokens,
        recomputed_token_layers=outcome.token_layers,
    )


def _dropped(chunk: PlannedChunk) -> ChunkReport:
    return _unplaced(chunk, "dropped", "the prompt had no room left")


def _standing(chunk: PlannedChunk) -> ChunkReport:
    return _unplaced(chunk, "prefix", "it stands in an earlier turn of the session")


def _unplaced(chunk: PlannedChunk, kv: KvSource, why: str) -> ChunkReport:
    return ChunkReport(
        **_source(chunk).model_dump(),
        tokens=len(chunk.tokens.ids),
        kv=kv,
        why=why,
        context_tokens=len(chunk.tokens.context),
        position=None,
        repaired_tokens=0,
        recomputed_token_layers=0,
    )


def _timing(generation: Generation) -> Timing:
    watch = generation.watch
    return Timing(
        retrieve_ms=watch.ms("retrieve"),
        plan_ms=watch.ms("plan"),
        queue_ms=watch.ms("queue"),
        lookup_ms=watch.ms("lookup"),
        load_ms=watch.ms("load"),
        select_ms=watch.ms("select"),
        recompute_ms=watch.ms("recompute"),
        first_token_ms=watch.ms("first_token"),
        ttft_ms=generation.ttft_ms,
        total_ms=watch.total_ms,
    )
