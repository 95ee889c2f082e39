"""From the host to the device without waiting for what the device is doing."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the host, on ``device``. An ordinary copy would wait for all that was launched before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copy_over(target: int, source: int, nbytes: int, stream: torch.cuda.Stream) -> None:
    """Copy ``nbytes`` from page-locked memory at ``source`` to the CUDA device's memory at ``target``, in the order of
    ``stream``; both stay as they are until then.

    A tensor's ``copy_`` takes the host several times as long: more than the link does, for slabs of short chunks.

    Raises:
        RuntimeError: the driver refused.
    """
    if error := _driver().cuMemcpyHtoDAsync_v2(target, source, nbytes, stream.cuda_stream):
        raise RuntimeError(f"copying {nbytes} bytes to the device failed with CUDA error {error}")


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p
    driver.cuMemcpyHtoDAsync_v2.argtypes = (address, address, ctypes.c_size_t, address)
    return driver
