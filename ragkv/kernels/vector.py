"""A row times a matrix, which is bound by reading the matrix: what comes before and after is done on the way.

Before: RMS norm of the row, whose scale is known once the row has been read, and is applied to the sums. After: gate
and up to one activation, or the sum with what is there. The first of the matrix is read while the kernel before still
runs (programmatic dependent launch).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ragkv.kernels.shapes import DTYPES, early_launch


class Tile(NamedTuple):
    """``outputs`` of a program, ``inputs`` at a time."""

    outputs: int
    inputs: int
    warps: int


TILE = Tile(8, 512, 4)
"""The best of several on an H200, for the shapes of Llama 3.1 8B in a row."""


@triton.jit
def _take(
    sums, more, squares, w, up, x, norm, i, width, NORMED: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """Some inputs ``i``: ``w`` and ``up`` are (outputs, inputs) of the matrix."""
    values = tl.load(x + i, mask=i < width, other=0.0).to(tl.float32)
    if NORMED:
        squares += values * values
        values *= tl.load(norm + i, mask=i < width, other=0.0).to(tl.float32)
    sums += w.to(tl.float32) * values[None, :]
    if GATED:
        more += up.to(tl.float32) * values[None, :]
    return sums, more, squares


@triton.jit(do_not_specialize=["eps"])
def _product(
    x,
    norm,
    weight,
    bias,
    out,
    width,
    outputs,
    eps,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    i = tl.arange(0, IN)
    alive = n < outputs
    at = weight + n.to(tl.int64)[:, None] * width + i[None, :]
    to_up = tl.cast(outputs, tl.int64) * width
    # The lanes of a program only meet when all is summed.
    sums = tl.zeros([OUT, IN], tl.float32)
    more = tl.zeros([OUT, IN], tl.float32)
    squares = tl.zeros([IN], tl.float32)
    held = alive[:, None] & (i < width)[None, :]
    w = tl.load(at, mask=held, other=0.0)
    up = w
    if GATED:
        up = tl.load(at + to_up, mask=held, other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums, more, squares = _take(sums, more, squares, w, up, x, norm, i, width, NORMED, GATED)
    for start in range(IN, width, IN):
        held = alive[:, None] & (start + i < width)[None, :]
        w = tl.load(at + start, mask=held, other=0.0)
        up = w
        if GATED:
            up = tl.load(at + to_up + start, mask=held, other=0.0)
        sums, more, squares = _take(sums, more, squares, w, up, x, norm, start + i, width, NORMED, GATED)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    result = tl.sum(sums, 1) * scale
    if BIASED:
        result += tl.load(bias + n, mask=alive, other=0.0).to(tl.float32)
    if GATED:
        gate = result.to(dtype).to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = active * (tl.sum(more, 1) * scale).to(dtype).to(tl.float32)
    if ADDED:
        result += tl.load(out + n, mask=alive, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(dtype), mask=alive)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    added: bool = False,
    tile: Tile = TILE,
) -> None:
    """``x @ weight.T`` into ``out``.

    Args:
        x: (1, inputs), contiguous.
        weight: (outputs, inputs), contiguous; ``gated``: (2 · outputs, inputs), gates first.
        out: (1, outputs), contiguous; ``added``: the product is added to it.
        norm: weight of the RMS norm, with ``eps``, that ``x`` goes through before.
        bias: (outputs,).
        gated: silu(gate) · up is what is written.
    """
    width, outputs = x.shape[1], out.shape[1]
    if x.dtype not in DTYPES or {weight.dtype, out.dtype} != {x.dtype}:
        raise ValueError(f"a row of {x.dtype}, a matrix of {weight.dtype}, out {out.dtype}")
    if weight.shape != (outputs * (2 if gated else 1), width) or x.shape[0] != 1 or out.shape[0] != 1:
        raise ValueError(f"a row {tuple(x.shape)}, a matrix {tuple(weight.shape)}, out {tuple(out.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        raise ValueError("row, matrix and out must be contiguous")
    early = early_launch(x.device)
    _product[(-(-outputs // tile.outputs),)](
        x,
        x if norm is None else norm,
        weight,
        x if bias is None else bias,
        out,
        width,
        outputs,
        eps,
        tile.outputs,
        tile.inputs,
        norm is not None,
        bias is not None,
        gated,
        added,
        bool(early),
        num_warps=tile.warps,
        **early,
    )
