"""From the host to the device without waiting for what the device is doing."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

# Page-locked memory for small uploads, used in turn, half by half.
_HALF = 4 << 20
_ALIGNMENT = 64


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the host, on ``device``. An ordinary copy would wait for all that was launched before,
    and one from page-locked memory, by the copy engine, for all slabs that are on their way."""
    if device.type != "cuda":
        return tensor.to(device)
    outbox = _outbox()
    if outbox is None or not 0 < tensor.nbytes <= _HALF - _ALIGNMENT:
        return tensor.pin_memory().to(device, non_blocking=True)
    return outbox.upload(tensor, device)


class _Outbox:
    """Takes what is small, and has a kernel read it (:mod:`ragkv.kernels.fetch`)."""

    def __init__(self, fetch: Any) -> None:
        self._fetch = fetch
        self._memory = torch.empty(2 * _HALF, dtype=torch.uint8, pin_memory=True)
        self._half, self._at = 0, 0
        self._streams: dict[int, Any] = {}
        self._read: list[list[torch.cuda.Event]] = [[], []]
        self._lock = threading.Lock()

    def upload(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        nbytes = tensor.nbytes
        padded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        out = torch.empty(padded, dtype=torch.uint8, device=device)
        with self._lock:
            part = self._room(padded)
            part[:nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
            stream = torch.cuda.current_stream(device)
            self._streams[stream.cuda_stream] = stream
            self._fetch(part.view(torch.int32), out.view(torch.int32))
        return out[:nbytes].view(tensor.dtype).view(tensor.shape)

    def _room(self, nbytes: int) -> torch.Tensor:
        if self._at + nbytes > (self._half + 1) * _HALF:
            self._read[self._half] = [stream.record_event() for stream in self._streams.values()]
            self._streams.clear()
            self._half = 1 - self._half
            self._at = self._half * _HALF
            for event in self._read[self._half]:
                event.synchronize()
        start, self._at = self._at, self._at + nbytes
        return self._memory[start : self._at]


@cache
def _outbox() -> _Outbox | None:
    try:
        from ragkv.kernels.fetch import fetch  # needs Triton
    except ImportError:
        return None
    return _Outbox(fetch)


def copy_over(pairs: list[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
    """Have the copy engine bring (target, source, bytes) from page-locked memory to the CUDA device's, in the order of
    ``stream``; all of it stays where it is until then.

    A tensor's ``copy_`` takes the host several times as long: more than the link does, for slabs of short chunks.

    Raises:
        RuntimeError: the driver refused.
    """
    copy, handle = _driver().cuMemcpyHtoDAsync_v2, stream.cuda_stream
    for target, source, nbytes in pairs:
        if error := copy(target, source, nbytes, handle):
            raise RuntimeError(f"copying {nbytes} bytes to the device failed with CUDA error {error}")


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p
    driver.cuMemcpyHtoDAsync_v2.argtypes = (address, address, ctypes.c_size_t, address)
    return driver
