"""What a step of the serving engine costs, as a sum of what is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ragkv.errors import InputError
from ragkv.tally import StepRecord


@dataclass(frozen=True)
class StepCosts:
    """Seconds a step, row, token of KV read and token of prefill; moving blocks of KV to the host and back.

    The defaults are an 8B model in bf16 on one H200, rounded: its weights read once a step, 128 KiB of KV a token, 8k
    tokens of prefill in 0.2 s, page-locked copies at 55 GB/s. :meth:`fit` replaces the first four by measured ones.

    Attributes:
        copies_per_block: a block's pieces where layers lie apart, each of which takes ``copy_s`` more.
    """

    fixed_s: float = 4e-3
    row_s: float = 1e-5
    kv_token_s: float = 3.2e-8
    prefill_token_s: float = 2.5e-5
    block_bytes: int = 2 << 20
    bytes_per_s: float = 55e9
    copies_per_block: int = 64
    copy_s: float = 1e-5

    def step(self, rows: int, kv_tokens: int, prefill_tokens: int) -> float:
        return self.fixed_s + self.decode(rows, kv_tokens) + self.prefill_token_s * prefill_tokens

    def decode(self, rows: int, kv_tokens: int) -> float:
        """Of a step, what decoding adds."""
        return self.row_s * rows + self.kv_token_s * kv_tokens

    def move(self, blocks: int, *, piecewise: bool = False) -> float:
        """Seconds to copy blocks one way."""
        return blocks * (
            self.block_bytes / self.bytes_per_s + (self.copies_per_block * self.copy_s if piecewise else 0)
        )

    @classmethod
    def fit(cls, records: Iterable[StepRecord], **moving: Any) -> Self:
        """Of measured steps, by non-negative least squares of relative errors, scaled so that all steps together take
        what they took: slow ones hardly count in the squares. ``moving``: the other fields.

        Raises:
            InputError: fewer than four records, or one that took no time.
        """
        rows = [(1.0, r.rows, r.kv_tokens, r.prefill_tokens, r.seconds) for r in records]
        if len(rows) < 4 or min(row[-1] for row in rows) <= 0:
            raise InputError(f"step costs need 4 or more steps that took time; there are {len(rows)}")
        table = np.array(rows, np.float64)
        parts = table[:, :-1] / table[:, -1:]
        scale = np.maximum(parts.max(axis=0), 1e-300)  # columns of like size: one that is all zeros costs nothing
        from sklearn.linear_model import LinearRegression  # takes a second to import

        model = LinearRegression(positive=True, fit_intercept=False).fit(parts / scale, np.ones(len(rows)))
        found = np.where(parts.any(axis=0), model.coef_ / scale, 0.0)
        found *= table[:, -1].sum() / (table[:, :-1] @ found).sum()
        return cls(*found.tolist(), **moving)
