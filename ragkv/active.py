"""A request between submission and end, as the engine thread sees it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ragkv.generation import Generation
from ragkv.lineage import Lineage
from ragkv.paged import BLOCK_TOKENS
from ragkv.plan import PromptPlan
from ragkv.pool import Table, blocks_for
from ragkv.sampling import Sampler
from ragkv.scheduling import Ticket


class Phase(Enum):
    """``OUTSIDE``: waiting or preempted; ``ADMITTED``: it may run once there is room; ``LOADING``: blocks are coming
    back from RAM."""

    OUTSIDE = "outside"
    ADMITTED = "admitted"
    LOADING = "loading"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False)
class Active:
    """One request.

    Attributes:
        ids: its tokens, as far as the host knows them.
        written: tokens whose KV is written or being written.
        sampled: tokens of output chosen, of which the host may not know the last.
        lane: its place in the decoder.
        prefill_s: seconds of its prefill, or None where others' rows were computed in them as well.
    """

    generation: Generation
    ticket: Ticket
    ids: list[int]
    phase: Phase = Phase.OUTSIDE
    table: Table | None = None
    sampler: Sampler | None = None
    lane: int | None = None
    prefill_s: float | None = 0.0
    written: int = 0
    sampled: int = 0

    @property
    def over(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def complete(self) -> bool:
        """All KV that decoding needs is there: only the last token's is still to be written."""
        return self.sampled > 0 and self.table is not None and self.table.tokens >= len(self.ids) - 1

    @property
    def usable(self) -> int:
        """Tokens of the table's that a prefill can go on from: whole blocks, and no part of a chunk."""
        tokens = _whole(self.table.tokens if self.table is not None else 0)
        for span in reversed(self.generation.plan.spans):  # whole blocks may end in the chunk before
            if span.start < tokens < span.end:
                tokens = _whole(span.start)
        return tokens

    @property
    def lineage(self) -> Lineage:
        return self.generation.lineage


def _whole(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def admit(generation: Generation) -> Active:
    """A request as it comes in."""
    plan: PromptPlan = generation.plan
    prompt = len(plan.ids)
    ticket = Ticket(
        generation.id,
        prompt_tokens=prompt,
        max_tokens=generation.max_tokens,
        wants=blocks_for(prompt + 1),
        most=blocks_for(prompt + generation.max_tokens),
        tenant=generation.tenant,
        weight=generation.weight,
        priority=generation.priority,
    )
    return Active(generation, ticket, list(plan.ids))
