"""A prompt's scores, weighed and ready to be ranked, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_MOST = torch.finfo(torch.float32).max


@triton.jit(do_not_specialize=["length"])
def _weigh(scores, weights, out, length, MOST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = i < length
    weight = tl.load(weights + i, mask=held, other=0.0)
    certain = weight == float("inf")
    weighed = tl.load(scores + i, mask=held, other=0.0) * tl.where(certain, 0.0, weight)
    weighed = tl.maximum(tl.where(weighed <= MOST, weighed, MOST), -MOST)
    weighed = tl.where(weight < 0.0, float("-inf"), weighed)
    tl.store(out + i, tl.where(certain, float("inf"), weighed), mask=held)


def weigh(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``scores`` times ``weights``: infinity where a weight is infinite, whatever its score, and minus infinity where
    it is below 0. All else is between the least and the greatest float32; what is no number counts as the greatest.

    Args:
        scores: float32 (length,).
        weights: float32 (length,), which the device can read.
    """
    if scores.dtype != torch.float32 or weights.dtype != torch.float32 or weights.shape != scores.shape:
        raise ValueError(f"{len(scores)} scores of {scores.dtype}, weights {tuple(weights.shape)} of {weights.dtype}")
    out = torch.empty_like(scores)
    _weigh[(-(-len(scores) // _BLOCK),)](scores, weights, out, len(scores), _MOST, _BLOCK)
    return out
