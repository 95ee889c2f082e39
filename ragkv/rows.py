"""Some rows of a prompt on their way through the layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ragkv.attention import AttentionStep


@dataclass
class Rows:
    """Hidden states of some rows on their way through the layers.

    ``hidden`` is (1, rows, hidden_size), contiguous, and the rows' own: a layer may write into it. ``rotary`` is the
    library's cos and sin for the rows' positions; ``room`` whatever memory the layer loop uses again in every layer.
    """

    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    step: AttentionStep
    room: object = field(default=None, repr=False)
