"""Decoding: a token for each of many requests in one pass through the layers, their KV in a paged pool.

A request has a *lane*: its last token and position, which stay on the device, so that a step can be launched before the
host knows what the one before it came to. Not thread-safe: the engine thread owns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ragkv.errors import RagkvError
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.paged_step import Lane, PagedStep
from ragkv.runner import ModelRunner


class Loop(Protocol):
    """How the layers are run. It is told of lanes before it runs them."""

    def enter(self, number: int, token: int, position: int) -> None: ...

    def extend(self, number: int, first: int, blocks: Sequence[int]) -> None:
        """``blocks`` stand in the lane's table from ``first`` on."""

    def step(self, numbers: tuple[int, ...], lanes: Sequence[Lane]) -> torch.Tensor:
        """Write the KV of every lane's token and return float32 logits (lanes, vocab)."""

    def put_tokens(self, numbers: tuple[int, ...], tokens: torch.Tensor) -> None: ...


class Decoder:
    """Decodes up to ``lanes`` requests together, each at its own position, of at most ``max_tokens`` tokens.

    Attributes:
        runs: which loop runs the layers, ``fused`` or ``plain``.
    """

    def __init__(self, runner: ModelRunner, pool: PagedKV, *, lanes: int, max_tokens: int) -> None:
        self._limit, self._width = lanes, -(-max_tokens // BLOCK_TOKENS)
        self._lanes: dict[int, Lane] = {}
        self._loop: Loop = PlainLoop(runner, pool, lanes)
        self.runs = "plain"
        # A rotation that depends on the length of a prompt is none for rows of many.
        if runner.fused is not None and runner.rope.refusal is None:
            from ragkv.fused_decode import FusedLoop  # needs Triton

            self._loop, self.runs = FusedLoop(runner, runner.fused.layers, pool, lanes, self._width), "fused"

    @torch.inference_mode()
    def enter(self, lane: int, token: int, position: int, blocks: Sequence[int]) -> None:
        """A request begins or goes on in ``lane``: ``token``, whose KV is not yet written, stands at ``position``."""
        if not 0 <= lane < self._limit:
            raise RagkvError(f"lane {lane} is not one of {self._limit}")
        self._lanes[lane] = Lane(position)
        self._loop.enter(lane, token, position)
        self.extend(lane, blocks)

    def extend(self, lane: int, blocks: Sequence[int]) -> None:
        """Append ``blocks`` to the table of ``lane``."""
        state = self._lanes[lane]
        first = len(state.blocks)
        if first + len(blocks) > self._width:
            raise RagkvError(f"{first + len(blocks)} blocks for lane {lane}, whose table holds {self._width}")
        state.blocks.extend(blocks)
        self._loop.extend(lane, first, blocks)

    def left(self, lane: int) -> None:
        """The request in ``lane`` has ended or is preempted."""
        del self._lanes[lane]

    @torch.inference_mode()
    def step(self, lanes: Sequence[int]) -> torch.Tensor:
        """One token for each of ``lanes``, no two the same: float32 logits (lanes, vocab), good until the next step.

        Writes the KV of each lane's token at its position, attends over all positions up to it, and moves the lane on.
        What is sampled belongs into :meth:`put_tokens` before the next step.

        Raises:
            RagkvError: a lane's table does not reach its position.
        """
        numbers = tuple(lanes)
        states = [self._lanes[number] for number in numbers]
        for number, state in zip(numbers, states, strict=True):
            if state.position >= len(state.blocks) * BLOCK_TOKENS:
                raise RagkvError(f"lane {number} is at {state.position}, its {len(state.blocks)} blocks end before")
        logits = self._loop.step(numbers, states)
        for state in states:
            state.position += 1
        return logits

    @torch.inference_mode()
    def put_tokens(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """``tokens`` int64 (lanes,), on the device: what comes next in each lane. Nothing is waited for."""
        self._loop.put_tokens(tuple(lanes), tokens)


class PlainLoop:
    """The library's own layers; matrices are for all rows at once, attention is row by row (:class:`PagedStep`)."""

    def __init__(self, runner: ModelRunner, pool: PagedKV, lanes: int) -> None:
        self._runner, self._pool = runner, pool
        self._tokens = torch.zeros(lanes, dtype=torch.long, device=runner.device)

    def enter(self, number: int, token: int, position: int) -> None:
        self._tokens[number] = token

    def extend(self, number: int, first: int, blocks: Sequence[int]) -> None:
        """Lanes bring their tables along with every step."""

    def put_tokens(self, numbers: tuple[int, ...], tokens: torch.Tensor) -> None:
        self._tokens[self._runner.tensor(numbers)] = tokens

    def step(self, numbers: tuple[int, ...], lanes: Sequence[Lane]) -> torch.Tensor:
        runner, decoder = self._runner, self._runner.decoder
        step = PagedStep(self._pool, lanes)
        hidden = decoder.embed_tokens(self._tokens[runner.tensor(numbers)][None])
        positions = runner.tensor([lane.position for lane in lanes])[None]
        rotary = self._rotary(hidden, positions)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=step,
                position_ids=positions,
                past_key_values=step,
                use_cache=True,
                position_embeddings=rotary,
            )
        return runner.model.lm_head(decoder.norm(hidden))[0].float()  # type: ignore[no-any-return]

    def _rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self._runner.decoder.rotary_emb
        if self._runner.rope.refusal is None:
            return rotary(hidden, positions)  # type: ignore[no-any-return]
        # Frequencies that depend on the length are those of the longest sequence in a call.
        cos, sin = zip(*(rotary(hidden, each) for each in torch.split(positions, 1, dim=1)), strict=True)
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)
