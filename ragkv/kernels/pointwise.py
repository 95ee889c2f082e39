"""RMS norm and gated activation, rounded as the library rounds them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragkv.kernels.shapes import next_power_of_2

BLOCK = 2048


@triton.jit(do_not_specialize=["eps"])
def _rms_norm(x, weight, out, eps, WIDTH: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    held = i < WIDTH
    dtype = out.dtype.element_ty
    values = tl.load(x + row * WIDTH + i, mask=held, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    w = tl.load(weight + i, mask=held, other=0.0).to(tl.float32)
    normed = (values * scale).to(dtype).to(tl.float32) * w
    tl.store(out + row * WIDTH + i, normed.to(dtype), mask=held)


@triton.jit
def _silu_mul(gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = i < WIDTH
    dtype = gate_up.dtype.element_ty
    at = gate_up + row * (2 * WIDTH) + i
    gate = tl.load(at, mask=held, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=held, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(at, (active * up).to(dtype), mask=held)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """``weight`` (width,) times ``x`` (rows, width) divided by its root mean square, into ``out``; contiguous all."""
    rows, width = x.shape
    if not (x.is_contiguous() and out.is_contiguous() and out.shape == x.shape and weight.shape == (width,)):
        raise ValueError(f"rows {tuple(x.shape)}, weight {tuple(weight.shape)}, out {tuple(out.shape)}")
    _rms_norm[(rows,)](x, weight, out, eps, width, next_power_of_2(width), num_warps=8 if width > 2048 else 4)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of ``gate_up`` (rows, 2 · width), contiguous: written over the gate, and returned as a view
    (rows, width) of it."""
    rows, double = gate_up.shape
    if not gate_up.is_contiguous() or double % 2:
        raise ValueError(f"gate and up {tuple(gate_up.shape)} of strides {gate_up.stride()}")
    width = double // 2
    _silu_mul[(rows, -(-width // BLOCK))](gate_up, width, BLOCK, num_warps=8)
    return gate_up[:, :width]
