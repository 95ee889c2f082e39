"""Some rows of a prompt on their way through the layers, and those of several prompts on their way together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ragkv.attention import AttentionStep, JoinedStep


@dataclass(eq=False)
class Rows:
    """Hidden states of some rows on their way through the layers.

    ``hidden`` is (1, rows, hidden_size), contiguous, and the rows' own while they are on their way: a layer may write
    into it. ``rotary`` is the library's cos and sin for the rows' positions; ``room`` whatever memory the layer loop
    uses again in every layer, which these may lie in.
    """

    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    step: AttentionStep
    room: object = field(default=None, repr=False)


def empty_rows(step: AttentionStep, hidden: torch.Tensor, rotary: torch.Tensor) -> Rows:
    """Memory for the rows of ``step``, of the widths, dtypes and device of ``hidden`` and ``rotary``."""
    cos, sin = (rotary.new_empty((1, step.rows, rotary.shape[-1])) for _ in range(2))
    return Rows(hidden.new_empty((1, step.rows, hidden.shape[-1])), (cos, sin), step)


class Joined:
    """Rows of several prompts side by side, to go through layers as one; its attributes are as those of :class:`Rows`.

    All is copied here once. From then on each one's own is a view of it, and it may go on by itself.
    """

    def __init__(self, members: Sequence[Rows]) -> None:
        self._members = list(members)
        self.hidden = torch.cat([rows.hidden for rows in members], dim=1)
        cos, sin = (torch.cat(parts, dim=1) for parts in zip(*(rows.rotary for rows in members), strict=True))
        self.rotary = (cos, sin)
        self.step = JoinedStep([rows.step for rows in members])
        self.room: object = None
        sizes = [rows.step.rows for rows in members]
        each = zip(members, *(torch.split(part, sizes, dim=1) for part in self.rotary), strict=True)
        for rows, cos, sin in each:
            rows.rotary, rows.room = (cos, sin), None  # they may have lain there
        self.hand_out()

    def hand_out(self) -> None:
        """Have each one's hidden states be a view of these as they are now."""
        self._handed = torch.split(self.hidden, [rows.step.rows for rows in self._members], dim=1)
        for rows, hidden in zip(self._members, self._handed, strict=True):
            rows.hidden = hidden

    def holds(self, several: Sequence[Rows]) -> bool:
        """Whether it is of these rows, in this order, and none of them has gone on elsewhere."""
        return len(several) == len(self._members) and all(
            rows is member and rows.hidden is hidden
            for rows, member, hidden in zip(several, self._members, self._handed, strict=True)
        )
