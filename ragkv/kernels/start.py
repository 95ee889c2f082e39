"""Rows at a prompt's places, ready for the first layer: embedded, with their rotation, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import next_power_of_2

_MOST = 4096  # elements that a program copies at a time


@triton.jit(do_not_specialize=["spare"])
def _start(
    prompt,
    places,
    embedding,
    cos,
    sin,
    hidden,
    row_cos,
    row_sin,
    slots,
    spare,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTARY_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + tl.maximum(row - spare, 0))
    token = tl.load(prompt + place)
    tl.store(slots + row, place)
    i = tl.arange(0, ROTARY_PAD)
    tl.store(row_cos + row * ROTARY + i, tl.load(cos + place * ROTARY + i, mask=i < ROTARY), mask=i < ROTARY)
    tl.store(row_sin + row * ROTARY + i, tl.load(sin + place * ROTARY + i, mask=i < ROTARY), mask=i < ROTARY)
    for first in tl.static_range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(embedding + token * WIDTH + at, mask=at < WIDTH)
        tl.store(hidden + row * WIDTH + at, value, mask=at < WIDTH)


def start_rows(
    prompt: torch.Tensor,
    places: torch.Tensor,
    embedding: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
) -> None:
    """Fill in rows for the tokens of ``prompt`` at ``places``; where there are more rows, the first ones are all the
    first place's.

    Args:
        prompt: int64 (length,), token ids, which the device can read.
        places: int64 (at most rows,).
        embedding: (vocabulary, width).
        angles: the library's cos and sin, (positions, rotary_dim) each.
        hidden: (rows, width), written, as ``rotary``, (rows, rotary_dim) each, and ``slots``, int64 (rows,), are, these
            with each row's place. All contiguous.
    """
    rows, width = hidden.shape
    dim = angles[0].shape[-1]
    parts = (embedding, *angles, hidden, *rotary, slots, places, prompt)
    if not all(part.is_contiguous() for part in parts) or len(slots) != rows or len(places) > rows:
        raise ValueError(f"{len(places)} places for rows {tuple(hidden.shape)}, or something that is not contiguous")
    if embedding.shape[1] != width or any(part.shape != (rows, dim) for part in rotary):
        raise ValueError(f"rows {tuple(hidden.shape)}, embedding {tuple(embedding.shape)}, {dim} rotary dimensions")
    block = min(_MOST, next_power_of_2(width))
    _start[(rows,)](
        prompt,
        places,
        embedding,
        *angles,
        hidden,
        *rotary,
        slots,
        rows - len(places),
        width,
        block,
        dim,
        next_power_of_2(dim),
        num_warps=4,
    )
