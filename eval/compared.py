"""Answers from blended KV beside full prefill's to the same prompt, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ragkv.attention import AttentionStep
from ragkv.checkpoint import Checkpoint
from ragkv.clock import Stopwatch
from ragkv.errors import StoreFullError
from ragkv.eval.agreement import first_token_kl, is_accepted, same_answer
from ragkv.eval.choice import RAW, Candidate, Mark
from ragkv.eval.corpus import Corpus
from ragkv.eval.probes import Probe
from ragkv.eval.steps import drained
from ragkv.plan import PromptPlan, make_plan
from ragkv.prefill import FULL, Prefill, PrefillResult
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore


class Reference(NamedTuple):
    """What full prefill says. ``picks[i]`` is the likeliest token after ``ids[:i]``, ``margins[i]`` by how much
    probability it leads the next; ``logits`` (vocab,) are the first token's, ``text`` the answer."""

    logits: torch.Tensor
    ids: tuple[int, ...]
    picks: tuple[int, ...]
    margins: tuple[float, ...]
    text: str


class Compared:
    """Marks settings on probes. A reference is computed once and kept.

    Agreement, of which a loss is what is missing to 1:

    * on a question: 1 where both greedy answers are the same after normalisation, or the blended one is accepted, else
      0;
    * on a sentence to be continued: the share of places of its rest where the likeliest next token is the same, each
      counted by full prefill's margin there: a near tie that falls the other way is no loss.
    """

    def __init__(self, corpus: Corpus, checkpoint: Checkpoint, probes: Sequence[Probe], *, room: int) -> None:
        self._corpus, self._probes, self._room = corpus, probes, room
        self._runner, self._tokenizer = checkpoint.runner, checkpoint.tokenizer
        self._ends = checkpoint.tokenizer.eos_ids | checkpoint.runner.eos_ids
        self._references: dict[int, Reference] = {}

    @torch.inference_mode()
    def mark(self, candidate: Candidate, number: int) -> Mark:
        """How ``candidate`` fares on probe ``number``.

        Raises:
            StoreFullError: the chunks of one prompt do not fit the store.
        """
        probe, expected = self._probes[number], self.reference(number)
        plan = self._corpus.plan(probe, candidate.codec)
        self._corpus.encode([plan], candidate.codec)
        result = self._prefill(plan, candidate.method, candidate.ratio, number)
        if result.to_encode:
            raise StoreFullError("the chunks of one prompt do not fit the store; raise store_bytes")
        found = _picks(along(self._runner, result, len(plan.ids), expected.ids))
        same = [one == other for one, other in zip(found, expected.picks, strict=True)]
        text = expected.text
        if not probe.rest and found != expected.picks:
            begun = _up_to_difference(found, expected.ids)
            text = self._text(greedy(self._runner, result, len(plan.ids), begun, self._ends, self._room))
        return Mark(
            agreement=_weighed(same, expected.margins) if probe.rest else float(_agrees(text, expected.text, probe)),
            tokens=sum(same) / len(same),
            kl=first_token_kl(expected.logits, result.logits),
            share=self._share(plan, result),
            right=is_accepted(text, probe.answers) if probe.answers else None,
        )

    @torch.inference_mode()
    def deviations(self, number: int) -> torch.Tensor:
        """float64 (layers, tokens), on the host: how far the stored values of probe ``number``'s repairable tokens are
        from full prefill's, Σ (V_new − V_old)², in units of a token's mean Σ V_new² at that layer.

        Raises:
            StoreFullError: the chunks of one prompt do not fit the store.
        """
        plan = self._corpus.plan(self._probes[number], RAW)
        self._corpus.encode([plan], RAW)
        full, stored = (self._prefill(plan, method, 1.0, number).kv for method in (FULL, "none"))
        places = [j for span in plan.spans if span.context_present for j in range(span.start, span.end)]
        found = []
        for layer in range(self._runner.shape.layers):
            new, old = (kv.read(layer, len(plan.ids))[1][places].double() for kv in (full, stored))
            found.append((new - old).square().sum(dim=(1, 2)) / new.square().sum(dim=(1, 2)).mean())
        return torch.stack(found).cpu()

    def right(self, number: int) -> bool:
        """Whether full prefill's answer is an accepted one."""
        return is_accepted(self.reference(number).text, self._probes[number].answers)

    @torch.inference_mode()
    def reference(self, number: int) -> Reference:
        """What full prefill says to probe ``number``."""
        if number not in self._references:
            self._references[number] = self._refer(self._probes[number], number)
        return self._references[number]

    def _refer(self, probe: Probe, number: int) -> Reference:
        plan = self._corpus.plan(probe, RAW)
        result = self._prefill(plan, FULL, 1.0, number)
        answer = probe.rest or greedy(self._runner, result, len(plan.ids), [], self._ends, self._room)
        logits = along(self._runner, result, len(plan.ids), answer)
        best = logits.softmax(dim=-1).topk(2).values
        margins = tuple((best[:, 0] - best[:, 1]).tolist())
        return Reference(result.logits.cpu(), tuple(answer), _picks(logits), margins, self._text(answer))

    def _prefill(self, plan: PromptPlan, method: str, ratio: float, seed: int) -> PrefillResult:
        prefill = Prefill(
            self._runner,
            self._corpus.store,
            plan,
            strategy=method,
            ratio=ratio,
            room=self._room,
            watch=Stopwatch(),
            seed=seed,
        )
        return drained(prefill.run())

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([token for token in tokens if token not in self._ends])

    def _share(self, plan: PromptPlan, result: PrefillResult) -> float:
        recomputed = sum(outcome.token_layers for outcome in result.outcomes)
        return recomputed / (plan.context_tokens * self._runner.shape.layers)


class Scribe:
    """Writes replies of up to ``room`` tokens to single messages, greedily."""

    def __init__(self, checkpoint: Checkpoint, store: ChunkStore, *, room: int) -> None:
        self._runner, self._tokenizer, self._store, self._room = checkpoint.runner, checkpoint.tokenizer, store, room
        self._ends = checkpoint.tokenizer.eos_ids | checkpoint.runner.eos_ids
        self._prefix, self._suffix = checkpoint.tokenizer.frame("", [])

    @torch.inference_mode()
    def __call__(self, message: str) -> str:
        """Raises PromptTooLongError."""
        ids = (*self._tokenizer.plain(message), *self._suffix)
        plan = make_plan(self._prefix, [], ids, budget=self._runner.max_positions - self._room)
        prefill = Prefill(self._runner, self._store, plan, strategy=FULL, ratio=1.0, room=self._room, watch=Stopwatch())
        tokens = greedy(self._runner, drained(prefill.run()), len(plan.ids), [], self._ends, self._room)
        return self._tokenizer.decode([token for token in tokens if token not in self._ends])


def greedy(
    runner: ModelRunner, result: PrefillResult, start: int, begun: Sequence[int], ends: frozenset[int], room: int
) -> tuple[int, ...]:
    """The greedy answer of up to ``room`` tokens behind ``start`` tokens of a prompt; a token that ends it is its last.

    It begins with ``begun``, of which all but the last are in ``result.kv``.
    """
    tokens = list(begun) or [int(result.logits.argmax())]
    while tokens[-1] not in ends and len(tokens) < room:
        tokens.append(int(runner.decode(tokens[-1], start + len(tokens) - 1, result.kv).argmax()))
    return tuple(tokens)


def along(runner: ModelRunner, result: PrefillResult, start: int, ids: Sequence[int]) -> torch.Tensor:
    """float32 logits (ids, vocab) at every place of ``ids`` when those before it are given, behind ``start`` tokens of
    a prompt. One pass; the KV of all ``ids`` but the last is then in ``result.kv``."""
    logits = [result.logits]
    if len(ids) > 1:
        end = start + len(ids) - 1
        step = AttentionStep(result.kv, torch.arange(start, end, device=runner.device), end, contiguous=False)
        rows = runner.rows(runner.tensor(ids[:-1]), step)
        for layer in range(runner.shape.layers):
            runner.run_layer(layer, rows)
        logits += [runner.logits(replace(rows, hidden=rows.hidden[:, : i + 1])) for i in range(len(ids) - 1)]
    return torch.stack(logits)


def _picks(logits: torch.Tensor) -> tuple[int, ...]:
    return tuple(map(int, logits.argmax(dim=-1).tolist()))


def _weighed(same: Sequence[bool], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(weight for one, weight in zip(same, weights, strict=True) if one) / total if total else 1.0


def _up_to_difference(found: Sequence[int], ids: Sequence[int]) -> list[int]:
    """``ids`` up to the first place where another token is picked, and that token."""
    same = next((i for i, (pick, token) in enumerate(zip(found, ids, strict=True)) if pick != token), len(ids) - 1)
    return [*ids[:same], found[same]]


def _agrees(text: str, expected: str, probe: Probe) -> bool:
    return same_answer(text, expected) or is_accepted(text, probe.answers)
