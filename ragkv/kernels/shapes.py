"""What the kernels take for granted of their arguments, checked where they are called."""

from __future__ import annotations

from functools import cache

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INT32 = 2**31


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it still runs, for a kernel that waits for it by
    itself: where the device can (Hopper and later)."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"launch_pdl": True} if hopper else {}


def check_kv(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``k`` and ``v`` are one layer's (length, kv_heads, head_dim) of equal strides, ``rows`` (rows, …) is contiguous,
    ``slots`` int64 (rows,).

    Raises:
        ValueError: they are not.
    """
    if k.dtype not in DTYPES or v.dtype != k.dtype or slots.dtype != torch.int64:
        raise ValueError(f"keys are {k.dtype}, values {v.dtype}, slots {slots.dtype}")
    if k.shape != v.shape or k.stride() != v.stride() or k.stride(2) != 1:
        raise ValueError(f"keys {tuple(k.shape)} of strides {k.stride()}, values {tuple(v.shape)} of {v.stride()}")
    if slots.shape != rows.shape[:1] or not slots.is_contiguous() or not rows.is_contiguous():
        raise ValueError(f"{tuple(slots.shape)} slots for rows {tuple(rows.shape)} of strides {rows.stride()}")
    # Offsets within a layer are computed in 32 bits.
    if k.shape[0] * k.stride(0) >= _INT32 or rows.numel() >= _INT32:
        raise ValueError(f"{k.shape[0]} keys or {rows.shape[0]} rows are too many for one call")
