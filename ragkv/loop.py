"""The engine thread: the only thread that touches the model.

A turn: see which blocks have moved, let the scheduler say who is preempted and who starts, advance prefills for a slice
of time, give every decoding request one token. So a long prompt never stalls the others for longer than that slice;
after each prefill, and whenever there is none, chunks are encoded for the store for such a slice. It waits for the disk
only to open a prompt's entries and where the layer it needs next is still being read; it never writes, tokenises,
detokenises or talks to a client.

Who is next is the scheduler's to say (:mod:`ragkv.scheduling`), where KV lies the pool's (:mod:`ragkv.pool`), who is
computed together that of those in their prefill (:mod:`ragkv.prefills`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from ragkv.active import Active, Phase, admit
from ragkv.chunks import EncodeGroup
from ragkv.controller import Controller
from ragkv.costs import Machine
from ragkv.decodes import Decodes, scores_of
from ragkv.decoding import Decoder
from ragkv.device_tier import DeviceTier
from ragkv.encodings import SLICE_S as ENCODE_SLICE_S
from ragkv.encodings import Encodings, OnEncoded
from ragkv.errors import EngineClosedError, NotFoundError, PromptTooLongError, RagkvError
from ragkv.generation import Generation, TokenScores
from ragkv.kv import Known, RequestKV
from ragkv.lineage import ALL
from ragkv.paged import BLOCK_TOKENS
from ragkv.plan import Span
from ragkv.pool import KvPool, blocks_for
from ragkv.prefill import Prefill, PrefillResult
from ragkv.prefills import Prefills
from ragkv.runner import ModelRunner, use_device
from ragkv.sampling import Sampler, sample
from ragkv.scheduling import Plan, Scheduler, Ticket
from ragkv.store import ChunkStore
from ragkv.tally import StepRecord, Tally
from ragkv.types import FinishReason

# In their prefill at once, so that some may be computed together; the last place is kept for who may displace the
# others, and is computed before them.
PREFILLS = 5
# Layers launched ahead of the device while others decode: a clock of the host's that is not fooled.
LAUNCHED_AHEAD = 2
_IDLE_S = 0.5
_WAIT_FOR_MOVES_S = 2e-4
log = logging.getLogger("ragkv")


class EngineLoop:
    """Serves :class:`Generation` requests and encodes chunks, until closed.

    Args:
        pool: has the KV of all conversations; it is closed with the loop.
        max_running: requests that may run at once; ``scheduler`` was told the same.
        stall_s: most time that prefills put between two decode steps.
        on_missing: called with the spans of a prefill whose chunks the store lacks.
        controller: chooses for requests that name no method, from when ``measuring`` is through: it is advanced
            while there is nothing else to do.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: ChunkStore,
        pool: KvPool,
        scheduler: Scheduler,
        *,
        max_running: int,
        on_missing: Callable[[list[Span]], None],
        stall_s: float = 0.05,
        blending_off: str | None = None,
        controller: Controller | None = None,
        measuring: Generator[None, None, Machine] | None = None,
        device_tier: DeviceTier | None = None,
    ) -> None:
        self._runner, self._store, self._pool, self._scheduler = runner, store, pool, scheduler
        self._controller, self._measuring = controller, measuring
        self._capturing: Iterator[None] | None = runner.capture_all()
        self._device_tier = device_tier
        self._on_missing, self._stall_s = on_missing, stall_s
        self.blending_off = blending_off
        most = min(runner.max_positions, pool.memory.blocks * BLOCK_TOKENS)
        decoder = Decoder(runner, pool.memory, lanes=max_running, max_tokens=most)
        self._decodes = Decodes(decoder, pool, runner.device, max_running, self._deliver)
        self._wake = threading.Condition()
        self._by_id: dict[str, Active] = {}
        self._by_ticket: dict[Ticket, Active] = {}
        self._admitted: list[Active] = []
        self._prefills = Prefills(runner, controller, self._first_token, self._fail)
        self._served: list[Ticket] = []
        self._encodings = Encodings(runner)
        self._owes_encoding = False
        self._closed = False
        self.tally = Tally()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="ragkv-engine", daemon=True)
        self._thread.start()

    # Called from other threads.

    def submit(self, generation: Generation, accepted: Callable[[], None] = lambda: None) -> None:
        """Queue a request; ``accepted`` is called before anything of it is.

        Raises:
            QueueFullError: as many requests, or tokens, wait as are allowed to.
            PromptTooLongError: its KV would not fit the pool even if it were alone.
            EngineClosedError: the engine was closed or has failed.
        """
        request = admit(generation)
        blocks = self._pool.memory.blocks
        if request.ticket.most > blocks:
            raise PromptTooLongError(
                f"prompt and max_tokens are {len(request.ids) + generation.max_tokens} tokens, and the pool holds "
                f"{blocks * BLOCK_TOKENS}; shorten them, or raise pool_bytes",
                tokens=len(request.ids) + generation.max_tokens,
                limit=blocks * BLOCK_TOKENS,
            )
        with self._wake:
            self.refuse_when_closed()
            self._scheduler.submit(request.ticket)
            self._by_id[generation.id] = self._by_ticket[request.ticket] = request
            accepted()
            self._wake.notify()

    def submit_encode(self, group: EncodeGroup, on_encoded: OnEncoded) -> None:
        """Queue chunks to encode; ``on_encoded`` is called on the engine thread and must not block."""
        with self._wake:
            self.refuse_when_closed()
            self._encodings.put(group, on_encoded)
            self._wake.notify()

    def reprioritize(self, request_id: str, priority: int, tenant: str = "") -> None:
        """Give a request another priority; lower is sooner.

        Raises:
            NotFoundError: it is none of this tenant's, or over.
        """
        with self._wake:
            self._scheduler.set_priority(self._find(request_id, tenant).ticket, priority)
            self._wake.notify()

    def cancel(self, request_id: str, tenant: str = "") -> None:
        """End a request. Raises NotFoundError: it is none of this tenant's, or over."""
        with self._wake:
            self._find(request_id, tenant).generation.stop.set()
            self._wake.notify()

    @property
    def running(self) -> int:
        return self._scheduler.stats.running

    @property
    def queued(self) -> int:
        return self._scheduler.stats.waiting

    def service(self) -> dict[str, int]:
        """By tenant: prompt tokens computed for it, and twice its tokens of output."""
        with self._wake:
            return dict(self._scheduler.stats.service)

    def stats(self) -> dict[str, float]:
        """Numbers by name, of the engine's whole life."""
        with self._wake:
            scheduled = self._scheduler.stats
        numbers = {name: value for name, value in vars(self.tally).items() if name != "records"}
        waiting = {"queued_tokens": scheduled.waiting_tokens, "preempted": scheduled.preempted}
        return {**numbers, **waiting, "joined_layers": self._prefills.joined_layers, **self._pool.stats()}

    @property
    def records(self) -> list[StepRecord]:
        """The last steps."""
        return list(self.tally.records)

    def close(self) -> None:
        """Stop after the current layer; requests in flight get an :class:`EngineClosedError`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def refuse_when_closed(self) -> None:
        """Raises EngineClosedError when nothing will be served any more."""
        if self._closed:
            raise EngineClosedError(self.failure or "the engine was closed")

    def _find(self, request_id: str, tenant: str) -> Active:
        request = self._by_id.get(request_id)
        if request is None or request.generation.tenant != tenant:
            raise NotFoundError(f"no request {request_id!r} is waiting or running", request_id=request_id)
        return request

    # On the engine thread.

    def _run(self) -> None:
        try:
            use_device(self._runner.device)
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        except BaseException as error:  # the thread must not die silently: health reports it
            log.exception("the engine thread failed")
            self.failure = f"the engine failed: {error!r}"
        finally:
            self._abort_all()

    def _wait(self) -> bool:
        with self._wake:
            while not self._closed and not self._has_work():
                began = time.perf_counter()
                self._wake.wait(_IDLE_S)
                self.tally.idle_seconds += time.perf_counter() - began
                self._pool.poll()
        return not self._closed

    def _has_work(self) -> bool:
        return bool(self._by_ticket or self._encodings or self._measuring or self._capturing)

    def _turn(self) -> None:
        began = time.perf_counter()
        self._pool.poll()
        self._drop_cancelled()
        self._schedule()
        for request in list(self._admitted):
            self._bring(request)
        encoding = bool(self._encodings)
        done = 0.0
        if self._prefills.requests and not (encoding and self._owes_encoding):
            done = self._advance_prefills()
        elif encoding:
            self._encodings.advance(lambda seconds: self._closed or bool(self._by_ticket and seconds > ENCODE_SLICE_S))
            self._owes_encoding = False
        elif not self._by_ticket:
            self._advance_beside()
        rows, seen = self._decode()
        if rows or done:
            seconds = time.perf_counter() - began
            self.tally.steps += 1
            self.tally.step_seconds += seconds
            self.tally.records.append(StepRecord(rows, seen, done, seconds))
        elif self._by_ticket and not encoding:
            time.sleep(_WAIT_FOR_MOVES_S)  # moves are waited for

    def _schedule(self) -> None:
        while self._apply(self._plan()).preempt:
            pass  # what that set free at once is given away at once

    def _plan(self) -> Plan:
        began = time.perf_counter()
        for request in self._decodes.requests:
            table, ticket = request.table, request.ticket
            if table is not None:
                ticket.wants = int(request.written >= len(table.blocks) * BLOCK_TOKENS)
        with self._wake:
            self._charge()
            plan = self._scheduler.plan(self._pool.available, self._pool.freeing, starting=PREFILLS)
        self.tally.scheduler_seconds += time.perf_counter() - began
        return plan

    def _apply(self, plan: Plan) -> Plan:
        # Preempting one delivers tokens, which may end another.
        preempted, started = ([self._by_ticket[ticket] for ticket in tickets] for tickets in (plan.preempt, plan.start))
        for request in preempted:
            self._preempt(request)
        for request in started:
            request.generation.watch.lap("queue")
            request.phase = Phase.ADMITTED
            self._admitted.append(request)
        return plan

    def _charge(self) -> None:
        """Tell the scheduler of the tokens delivered since. Under the lock."""
        self._scheduler.charge_many(self._served)
        self._served.clear()

    def _drop_cancelled(self) -> None:
        """At once, not when their turn comes: until then they would take the place of the living."""
        with self._wake:
            gone = [request for request in self._by_ticket.values() if request.generation.cancelled]
        for request in gone:
            self._finish(request, "cancelled")

    # Getting KV to the device.

    def _bring(self, request: Active) -> None:
        """Have its blocks on the device, as soon as there is room and they have arrived."""
        pool, ticket = self._pool, request.ticket
        if request.phase is Phase.ADMITTED:
            if request.table is None:
                request.table = pool.open(request.ids, request.lineage)
            if not request.table.in_memory:
                return
            pool.survey(request.table)
            if not request.complete and request.table.tokens != request.usable:
                pool.cut(request.table, request.usable)
            if not pool.bring(request.table, len(request.ids) + 1):
                return
            ticket.wants, ticket.blocks = 0, pool.exclusive(request.table)
            request.phase = Phase.LOADING
        if request.table is not None and request.table.arrived:
            self._admitted.remove(request)
            self._begin(request)

    def _begin(self, request: Active) -> None:
        if request.complete:
            self._decodes.enter(request)
            return
        generation, table = request.generation, request.table
        if table is None:
            raise RuntimeError("a request without a table cannot begin")

        def fill(kv: RequestKV) -> None:
            self._pool.memory.gather(table.places, kv, table.tokens)

        if not request.sampled:
            generation.known_tokens = table.tokens
        else:
            self.tally.recomputed_tokens += len(request.ids) - table.tokens
        prefill = Prefill(
            self._runner,
            self._store,
            generation.plan,
            strategy=generation.strategy,
            ratio=generation.ratio,
            seed=generation.seed,
            known=Known(table.tokens, fill),
            tail=request.ids[len(generation.plan.ids) :],
            watch=generation.watch,
            blending_off=self.blending_off,
            controller=None if generation.as_asked else self._controller,
            device_tier=self._device_tier,
        )
        self._prefills.enter(request, prefill)

    def _preempt(self, request: Active) -> None:
        """Give its room to others. What it was to deliver is delivered first; then the host knows all its tokens."""
        self._decodes.collect()
        if request.over:
            return
        self.tally.preemptions += 1
        request.generation.preemptions += 1
        self._withdraw(request)
        if request.table is not None and request.table.resident:
            self._pool.park(request.table)
        request.phase = Phase.OUTSIDE
        request.ticket.blocks, request.ticket.wants = 0, blocks_for(len(request.ids) + 1)

    def _withdraw(self, request: Active) -> None:
        """Out of whatever phase it is in."""
        if request in self._admitted:
            self._admitted.remove(request)
        if request.phase is Phase.PREFILL:
            self._prefills.leave(request)
        if request.phase is Phase.DECODE:
            self._decodes.leave(request)
            if request.table is not None:
                self._pool.wrote(request.table, request.ids, len(request.ids) - 1)

    # Computing.

    def _advance_prefills(self) -> float:
        """Advance the best prefills for a slice of time. Returns about how many tokens of their prompts that was."""
        with self._wake:
            turn = self._scheduler.in_turn([request.ticket for request in self._prefills.requests])
            waiting = self._scheduler.stats.waiting
        self._prefills.begin([self._by_ticket[ticket] for ticket in turn], waiting)
        deadline, ahead, done = time.perf_counter() + self._stall_s, deque[Any](), 0.0
        while going := self._prefills.requests:
            for request in going:
                if request.generation.cancelled:
                    self._finish(request, "cancelled")
            done += self._prefills.step()
            self._owes_encoding |= len(self._prefills.requests) < len(going)
            if self._decodes.requests:
                self._pace(ahead)
            if self._closed or time.perf_counter() > deadline:
                break
        self._prefills.end()
        return done

    def _pace(self, ahead: deque[Any]) -> None:
        """Do not launch further ahead of the device than the slice can be kept to."""
        if self._runner.device.type == "cuda":
            ahead.append(torch.cuda.current_stream(self._runner.device).record_event())
            if len(ahead) > LAUNCHED_AHEAD:
                ahead.popleft().synchronize()

    def _first_token(self, request: Active, result: PrefillResult) -> None:
        generation, table = request.generation, request.table
        if table is None:
            raise RuntimeError("a request without a table has no room for its KV")
        known = table.tokens
        generation.lineage = table.lineage = table.lineage.until(max(result.exact, known))
        self._pool.place(table, result.kv, len(request.ids))
        self._pool.wrote(table, request.ids, len(request.ids))
        if request.sampler is None:
            request.sampler = Sampler(
                generation.sampling, generation.plan.ids, self._runner.vocab_size, self._runner.device
            )
        sampled = sample(result.logits[None], [request.sampler])
        token = int(sampled.tokens[0])
        forecast = result.learn()
        seconds = self._prefills.seconds(request)
        if result.exact == ALL and seconds is not None:  # nothing of it was loaded, and it took that time alone
            self._pool.costs.computed(len(request.ids) - known, seconds)
        first = not request.sampled
        request.sampled += 1
        request.ids.append(token)
        if first:
            generation.watch.lap("first_token")
            generation.ttft_ms = generation.watch.total_ms
            generation.outcomes, generation.forecast = result.outcomes, forecast
            with self._wake:
                self._scheduler.charge(request.ticket, self._computed(generation, result, known), 0)
        if first and result.to_encode:
            self._on_missing(result.to_encode)  # before the answer may end: who has it may wait for them
        self._decodes.enter(request)
        self._deliver(request, token, scores_of(sampled, 0, request.sampler))

    def _computed(self, generation: Generation, result: PrefillResult, known: int) -> int:
        """Prompt tokens that were computed: what the tenant is charged."""
        layers, plan = self._runner.shape.layers, generation.plan
        outside = len(plan.ids) - plan.context_tokens - known
        outside += sum(span.length for span in plan.spans if span.end <= known)
        return max(0, outside) + round(sum(outcome.token_layers for outcome in result.outcomes) / layers)

    def _decode(self) -> tuple[int, int]:
        try:
            return self._decodes.step()
        except Exception:  # one request's failure must not take the others along
            self._decodes.step_each(self._fail)
            return 0, 0

    def _deliver(self, request: Active, token: int, scores: TokenScores | None) -> None:
        generation, table = request.generation, request.table
        self._served.append(request.ticket)
        self.tally.tokens += 1
        if token in generation.stop_ids:
            self._finish(request, "stop")
            return
        generation.on_token(token, scores)
        if len(request.ids) - len(generation.plan.ids) >= generation.max_tokens:
            self._finish(request, "length")
        elif table is not None and (len(request.ids) - 1) % BLOCK_TOKENS == 0:
            self._pool.wrote(table, request.ids, len(request.ids) - 1)
            request.ticket.blocks = len(table.blocks)

    # Ends.

    def _finish(self, request: Active, reason: FinishReason) -> None:
        if self._release(request):
            request.generation.watch.lap("decode" if request.sampled else "queue")
            request.generation.on_finish(reason)

    def _fail(self, request: Active, error: Exception) -> None:
        if not self._release(request):
            return
        if not isinstance(error, RagkvError):
            log.error("request %s failed", request.generation.id, exc_info=error)
        # Its frames would keep the request's KV alive for as long as the caller keeps the error.
        request.generation.on_error(error.with_traceback(None))

    def _release(self, request: Active) -> bool:
        """Give back all that it holds, whatever it was doing; False where that was done before."""
        if request.over:
            return False
        self._withdraw(request)
        if request.table is not None:
            self._pool.close(request.table, askable=request.generation.askable)
        request.phase = Phase.DONE
        with self._wake:
            self._charge()
            self._scheduler.finish(request.ticket)
            del self._by_id[request.generation.id], self._by_ticket[request.ticket]
        return True

    # Beside serving.

    def _advance_beside(self) -> None:
        """What nobody waits for yet: measure the machine, then capture what prompts to come will run in."""
        if self._measuring is not None:
            self._advance_measuring()
        elif self._capturing is not None and next(self._capturing, self) is self:
            self._capturing = None

    def _advance_measuring(self) -> None:
        if self._measuring is None or self._controller is None:
            return
        try:
            next(self._measuring)
        except StopIteration as done:
            self._controller.machine, self._measuring = done.value, None
        except Exception as error:  # it must not take the engine along; everything is done as asked then
            self._measuring = None
            log.warning(
                "the machine's speed could not be measured, so nothing is computed instead of loaded: %r", error
            )

    def _abort_all(self) -> None:
        with self._wake:
            self._closed = True
        why = self.failure or "the engine was closed while the request ran"
        for request in list(self._by_ticket.values()):
            try:
                self._fail(request, EngineClosedError(why))  # one each: they are raised in different threads
            except Exception:  # what has failed may be what it holds; everybody must hear of it
                log.exception("ending request %s failed", request.generation.id)
                request.generation.on_error(EngineClosedError(why))
        self._encodings.abort(why)
        self._pool.shut()
