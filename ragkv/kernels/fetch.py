"""Reading what lies in page-locked memory of the host, a kernel among others on its stream.

The copy engine would have it wait behind all that is being copied, on whichever stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORDS = 1024


@triton.jit(do_not_specialize=["words"])
def _fetch(source, out, words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i, mask=i < words), mask=i < words)


def fetch(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copy ``source``, int32 (words,) that the device can read, to ``out`` on the device."""
    words = source.numel()
    _fetch[(-(-words // _WORDS),)](source, out, words, _WORDS)
