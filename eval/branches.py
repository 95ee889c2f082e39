"""Several continuations of one context, computed together: every question of a world over one blended KV.

Behind the context stand the branches' tokens in the order in which they were computed, whosesoever they are, so that no
slot in use was never written: what garbage holds, no mask can undo. Positions go on from the context's end for each
branch as if it stood there alone, and a row sees the context and its own branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ragkv.attention import AttentionStep
from ragkv.kv import RequestKV
from ragkv.runner import ModelRunner


def slots_behind(prompts: Sequence[Sequence[int]], room: int) -> int:
    """Slots that branches beginning with ``prompts``, with up to ``room`` tokens each to come, need."""
    return sum(len(prompt) + room for prompt in prompts)


def generate_all(
    runner: ModelRunner,
    kv: RequestKV,
    start: int,
    prompts: Sequence[Sequence[int]],
    *,
    ends: frozenset[int],
    room: int,
) -> list[list[int]]:
    """Greedy continuations of every prompt behind the context in slots ``0 … start - 1`` of ``kv``, whose other slots
    are overwritten: up to ``room`` tokens each, without the one of ``ends`` that ended it."""
    answers: list[list[int]] = [[] for _ in prompts]
    running: dict[int, Sequence[int]] = dict(enumerate(prompts))
    behind = _Behind(start, [], [])
    while running:
        for branch, ids in running.items():
            behind.add(branch, len(ids))
        tokens = _run(runner, _BranchStep(runner, kv, behind, sum(map(len, running.values()))), list(running.values()))
        for branch, token in zip(list(running), tokens, strict=True):
            running[branch] = [token]
            if token not in ends:
                answers[branch].append(token)
            if token in ends or len(answers[branch]) == room:
                del running[branch]
    return answers


def _run(runner: ModelRunner, step: AttentionStep, pieces: Sequence[Sequence[int]]) -> list[int]:
    """The likeliest token after each piece."""
    rows = runner.rows(runner.tensor([token for piece in pieces for token in piece]), step)
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    logits = [runner.logits(replace(rows, hidden=rows.hidden[:, :end])) for end in accumulate(map(len, pieces))]
    return [int(token) for token in torch.stack(logits).argmax(dim=-1).tolist()]


@dataclass
class _Behind:
    """What stands in the slots from ``start`` on: whose token it is, and at which position."""

    start: int
    branches: list[int]
    positions: list[int]

    def add(self, branch: int, tokens: int) -> None:
        first = self.start + self.branches.count(branch)
        self.branches += [branch] * tokens
        self.positions += range(first, first + tokens)


class _BranchStep(AttentionStep):
    """The last ``rows`` tokens of ``behind``."""

    causal = False

    def __init__(self, runner: ModelRunner, kv: RequestKV, behind: _Behind, rows: int) -> None:
        end = behind.start + len(behind.branches)
        self._start, self._branches = behind.start, runner.tensor(behind.branches)
        self._where = torch.cat((torch.arange(behind.start, device=runner.device), runner.tensor(behind.positions)))
        super().__init__(kv, self._where[-rows:], end, contiguous=False)
        self.slots = torch.arange(end - rows, end, device=runner.device)

    @property
    def sees_all(self) -> bool:
        return False

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            keys = torch.arange(self.length, device=self.slots.device)
            allowed = keys <= self.slots[:, None]
            allowed[:, self._start :] &= self._branches == self._branches[-self.rows :, None]
            if window is not None:
                allowed &= self._where > self.positions[:, None] - window
            self._masks[window] = allowed
        return self._masks[window]
