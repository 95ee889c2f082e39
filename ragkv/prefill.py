"""From a prompt plan to the first token's logits: blended where stored KV is there, in full where it is not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import torch

from ragkv.blend import Blend, repair_budget
from ragkv.clock import Stopwatch
from ragkv.controller import Controller
from ragkv.costs import Piece, Work
from ragkv.device_tier import DeviceTier
from ragkv.errors import MissingEntryError, RagkvError, StoreError
from ragkv.kv import NOTHING, Known, RequestKV
from ragkv.lineage import ALL
from ragkv.loading import ChunkLostError, LayerLoader, Slabs
from ragkv.methods import outline, parameters
from ragkv.plan import PromptPlan, Span
from ragkv.prelude import Prelude, lookahead_positions
from ragkv.rows import Rows
from ragkv.runner import ModelRunner
from ragkv.selection import STRATEGIES
from ragkv.steps import LayerCall, Steps, alone
from ragkv.store import ChunkStore, EntryHeader, OpenEntry
from ragkv.trial import Trial, read_beside
from ragkv.types import Forecast, KvSource

FULL = "full"
KNOWN = "the KV of an earlier turn, or of the same beginning, was still there"


@dataclass
class SpanOutcome:
    """What happened to one chunk: where its KV came from, why it did not come from the store, what was
    recomputed of it."""

    kv: KvSource
    why: str | None = None
    repaired_tokens: int = 0
    token_layers: int = 0


@dataclass
class PrefillResult:
    """``tell`` says what became of the plan's spans, in their order; ``to_encode`` are spans the store should get.

    ``exact``: leading tokens whose KV was computed, or known, and not taken from the store, nor rests on such.
    ``learn`` tells the controller what it took, and returns the report of that, where the controller chose: to be
    called as soon as what was made of the logits is on the host, which on a device ends what it measures.
    """

    logits: torch.Tensor
    kv: RequestKV
    exact: int
    tell: Callable[[], list[SpanOutcome]]
    to_encode: list[Span] = field(default_factory=list)
    learn: Callable[[], Forecast | None] = field(default=lambda: None)

    @cached_property
    def outcomes(self) -> list[SpanOutcome]:
        """What ``tell`` says. It may wait for the device, so ask once the first token is there."""
        return self.tell()


class Prefill:
    """One request's prefill.

    Args:
        strategy: a name of :data:`ragkv.selection.STRATEGIES`, or ``full``.
        blending_off: why nothing may be blended, or None.
        room: slots to leave behind the prompt, for whoever goes on in the same KV.
        known: the beginning of the prompt whose KV need not be computed.
        tail: tokens behind the prompt, computed exactly once it stands: what was generated before a preemption.
        device_tier: has hot entries on the device, and keeps those that are brought there.
        controller: may compute more than is asked for, where that is faster; None does exactly what is asked for.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: ChunkStore,
        plan: PromptPlan,
        *,
        strategy: str,
        ratio: float,
        watch: Stopwatch,
        known: Known = NOTHING,
        tail: Sequence[int] = (),
        room: int = 0,
        blending_off: str | None = None,
        seed: int = 0,
        controller: Controller | None = None,
        device_tier: DeviceTier | None = None,
    ) -> None:
        self._runner, self._store, self._plan = runner, store, plan
        self._strategy, self._ratio, self._seed = strategy, ratio, seed
        self._known, self._tail, self._room = known, tail, room
        self._watch, self._off, self._controller = watch, blending_off, controller
        self._device_tier = DeviceTier(0, runner.device) if device_tier is None else device_tier
        self._why: dict[Span, str] = {}
        self._chosen: dict[Span, str] = {}
        self._opened: set[Span] = set()

    @property
    def least_rows(self) -> int:
        """Tokens that its first main pass is over, if all its chunks are stored and no more is computed than was asked
        for."""
        rows = len(self._plan.ids) - self._known.tokens
        reused = [span for span in self._plan.spans if span.end > self._known.tokens]
        if self._strategy == FULL or self._off or not reused:
            return rows + len(self._tail)
        ratio = self._ratio if "ratio" in parameters(self._strategy) else 0.0
        return rows - sum(span.length for span in reused) + repair_budget(reused, ratio)

    def run(self) -> Generator[None, None, PrefillResult]:
        """:meth:`steps`, each layer run by itself; yields between them."""
        return alone(self._runner, self.steps())

    def steps(self) -> Steps[PrefillResult]:
        """Leases on stored entries end with the generator, however it ends."""
        self._chosen = {span: KNOWN for span in self._plan.spans if span.end <= self._known.tokens}
        if self._strategy == FULL or self._off or len(self._chosen) == len(self._plan.spans):
            why = "full prefill was asked for" if self._strategy == FULL else self._off or "no documents"
            self._why = {span: why for span in self._plan.spans if span not in self._chosen}
            return (yield from self._full())
        while True:
            with ExitStack() as leases:
                entries = self._open(leases)
                trial = self._choose(entries)
                try:
                    result = yield from self._blend(entries, trial) if entries else self._full()
                    break
                except ChunkLostError as lost:
                    self._why.update((span, _unreadable(cause)) for span, cause in lost.causes.items())
        self._watch.lap("recompute")
        if trial and self._controller:
            result.learn = self._lesson(self._controller, trial)
        result.to_encode = [span for span in self._plan.spans if span in self._why]
        return result

    def _choose(self, entries: dict[Span, OpenEntry]) -> Trial | None:
        """Have the controller choose; what it would rather compute is taken out of ``entries``."""
        if self._controller is None:
            return None
        spans = list(entries)
        pieces = [self._piece(span, entry) for span, entry in entries.items()]
        asking = len(lookahead_positions(self._plan))
        work = Work(
            len(self._plan.ids) + len(self._tail),
            tuple(pieces),
            self._strategy,
            self._ratio,
            asking,
            self._runner.check_layer,
            self._known.tokens,
        )
        choice = self._controller.choose(work)
        if choice is None:
            return None
        if choice.beside is not None:
            read_beside(self._store, entries[spans[choice.beside]], self._controller)
        for index in set(range(len(spans))) - set(choice.loaded):
            self._chosen[spans[index]] = choice.why_computed(index)
            entries.pop(spans[index]).close()
        return Trial(choice, dict(self._watch.parts), self._watch.shared)

    def _piece(self, span: Span, entry: OpenEntry) -> Piece:
        nbytes, tier = self._runner.shape.entry_bytes(span.length, entry.header.codec), entry.tier
        if entry.key in self._device_tier:
            nbytes, tier = 0, "device"  # nothing is moved
        return Piece(span.length, span.start, nbytes, tier, span.context_present)

    def _lesson(self, controller: Controller, trial: Trial) -> Callable[[], Forecast]:
        if self._runner.device.type == "cuda":
            return partial(self._learn, controller, trial)  # not before the device has done what was launched
        # Here all is done, and choosing a token, which may take long, is no part of it.
        return partial(controller.learn, trial.choice, trial.actual(self._watch, overlapped=False))

    def _learn(self, controller: Controller, trial: Trial) -> Forecast:
        self._watch.lap("first_token")
        return controller.learn(trial.choice, trial.actual(self._watch, overlapped=True))

    def _open(self, leases: ExitStack) -> dict[Span, OpenEntry]:
        wanted = [span for span in self._plan.spans if span not in self._why and self._chosen.get(span) != KNOWN]
        opened = self._store.open([span.chunk.tokens.key for span in wanted])
        entries: dict[Span, OpenEntry] = {}
        for span, entry in zip(wanted, opened, strict=True):
            if isinstance(entry, RagkvError):
                # What is gone after it was open a moment ago was found damaged as well, in layers read ahead.
                missing = isinstance(entry, MissingEntryError) and span not in self._opened
                self._why[span] = "not stored yet" if missing else _unreadable(entry)
                continue
            self._opened.add(span)
            leases.enter_context(entry)
            if (wrong := self._mismatch(span, entry.header)) is None:
                entries[span] = entry
            else:
                entry.reject()
                self._why[span] = f"its stored KV is not this chunk's: {wrong}"
        self._watch.lap("lookup")
        return entries

    def _mismatch(self, span: Span, header: EntryHeader) -> str | None:
        """What of an entry is not as its key has it. Checksums find damage, not what was stored wrong."""
        tokens = span.chunk.tokens
        found = header.key, header.codec, header.tokens, header.geometry
        right = tokens.key, tokens.codec, span.length, self._runner.shape.geometry
        if found == right:
            return None
        names = "key", "codec", "token count", "shape"
        return f"another {' and '.join(n for n, one, other in zip(names, found, right, strict=True) if one != other)}"

    def _blend(self, entries: dict[Span, OpenEntry], trial: Trial | None) -> Steps[PrefillResult]:
        spans = list(entries)
        kv = self._workspace()
        # Nothing that the prelude uses is given back, so that what is loaded need not wait for it.
        behind = self._runner.moment()
        prelude = self._begin(spans)
        [codec] = {span.chunk.tokens.codec for span in spans}
        layers = self._runner.shape.layers
        way = outline(self._strategy, layers)
        order = way.loading_order(layers)
        with (
            closing(self._device_tier.lease(entry.header for entry in entries.values())) as lease,
            closing(
                self._store.open_layers([e for e in entries.values() if e.key not in lease.hits], order=order)
            ) as slabs,
            closing(
                LayerLoader(self._runner, kv, spans, slabs, codec, lease, order, behind, len(way.searched))
            ) as loader,
        ):
            self._watch.lap("load")
            blend = Blend(
                self._runner,
                self._plan,
                kv,
                loader,
                spans,
                strategy=STRATEGIES[self._strategy],
                ratio=self._ratio,
                known=self._known.tokens,
                prelude=prelude,
                seed=self._seed,
                watch=self._watch,
            )
            try:
                rows = yield from blend.steps()
            except ChunkLostError as lost:
                loader.close()
                yield from self._read_on(slabs, [s for s in spans if entries[s].key not in lease.hits], lost)
                raise
            if trial:
                trial.reader = slabs
            lease.commit()
        tiers = {span: "device" if entry.key in lease.hits else entry.tier for span, entry in entries.items()}
        tell = partial(self._blended, tiers, blend.dense_layers, rows.step.positions)
        rows = (yield from self._rest(kv, len(self._plan.ids))) or rows
        return PrefillResult(self._runner.logits(rows), kv, min(span.start for span in spans), tell)

    def _begin(self, spans: list[Span]) -> Prelude | None:
        if not outline(self._strategy, self._runner.shape.layers).searched or not repair_budget(spans, self._ratio):
            return None
        prelude = Prelude(self._runner, self._plan)
        self._watch.lap("select")
        return prelude

    def _read_on(self, slabs: Slabs, spans: list[Span], lost: ChunkLostError) -> Steps[None]:
        """Find what else is lost, lest every chunk cost an attempt. The sound ones are then in RAM for the next."""
        for layer in slabs:
            lost.causes.update((s, slab) for s, slab in zip(spans, layer, strict=True) if isinstance(slab, StoreError))
            self._watch.lap("load")
            yield None
            self._watch.lap("queue")

    def _blended(self, tiers: dict[Span, str], dense_layers: int, computed: torch.Tensor) -> list[SpanOutcome]:
        """``tiers`` are those of the spans that were loaded; ``computed`` the positions that were computed, ascending,
        in all layers but the dense ones."""
        spans = self._plan.spans
        bounds = computed.cpu().numpy().searchsorted([(span.start, span.end) for span in spans])
        return [
            self._outcome(span, tiers.get(span), dense_layers, int(end - start))
            for span, (start, end) in zip(spans, bounds, strict=True)
        ]

    def _outcome(self, span: Span, tier: str | None, dense_layers: int, repaired: int) -> SpanOutcome:
        layers = self._runner.shape.layers
        if tier is None:
            return self._computed(span)
        dense = dense_layers if span.context_present else 0
        return SpanOutcome(
            cast(KvSource, tier),
            None if span.context_present else "not repaired: its document context is not in this prompt",
            span.length if dense else repaired,
            span.length * dense + repaired * (layers - dense),
        )

    def _full(self) -> Steps[PrefillResult]:
        kv = self._workspace()
        rows = yield from self._rest(kv, self._known.tokens)
        if rows is None:
            raise RuntimeError("nothing is left to compute, so nothing to choose a token by")
        return PrefillResult(
            self._runner.logits(rows), kv, ALL, lambda: [self._computed(span) for span in self._plan.spans]
        )

    def _workspace(self) -> RequestKV:
        kv = self._runner.workspace(len(self._plan.ids) + len(self._tail) + self._room)
        self._known.fill(kv)
        return kv

    def _rest(self, kv: RequestKV, done: int) -> Steps[Rows | None]:
        """Compute all tokens behind the first ``done``, on top of them; None where there are none."""
        done = max(done, self._known.tokens)
        ids = [*self._plan.ids, *self._tail][done:]
        if not ids:
            return None
        rows = self._runner.start_prefill(self._runner.tensor(ids), kv, done)
        for layer in range(self._runner.shape.layers):
            self._watch.lap("recompute")
            yield LayerCall(layer, rows, self._watch, "recompute")
            self._watch.lap("queue")
        return rows

    def _computed(self, span: Span) -> SpanOutcome:
        if self._chosen.get(span) == KNOWN:
            return SpanOutcome("prefix", KNOWN)
        why = self._why.get(span) or self._chosen[span]
        return SpanOutcome("computed", why, span.length, span.length * self._runner.shape.layers)


def _unreadable(cause: RagkvError) -> str:
    if isinstance(cause, MissingEntryError):
        return "its stored KV was unreadable, or evicted meanwhile"
    return f"its stored KV was unreadable: {cause.message}"
