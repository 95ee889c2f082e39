"""From the host to the device without waiting for what the device is doing."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
# Page-locked memory for small uploads, used in turn, half by half.
_HALF = 4 << 20
_ALIGNMENT = 64


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the host, on ``device``. An ordinary copy would wait for all that was launched before,
    and one from page-locked memory, by the copy engine, for all slabs that are on their way."""
    return uploaded_together([tensor], device)[0]


def uploaded_together(
    tensors: Sequence[torch.Tensor], device: torch.device, stream: torch.cuda.Stream | None = None
) -> list[torch.Tensor]:
    """:func:`uploaded`, of several at once: that takes the host hardly longer than one.

    With a ``stream``, what is launched on it next finds them, and they come without waiting for the current one: its
    memory is the current one's still, and none of it may have been given back since ``stream`` waited for that.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    outbox, nbytes = _outbox(), sum(map(_padded, tensors))
    if outbox is None or not 0 < nbytes <= _HALF:  # too much, or nothing
        arrived = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        return arrived
    out = torch.empty(nbytes, dtype=torch.uint8, device=device)
    with torch.cuda.stream(stream):
        return outbox.upload(tensors, out)


@contextmanager
def handed(tensor: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """``tensor``, which is on the host, for kernels to read that are launched within, on the current stream: where
    they read little of it, or all of it once, that spares uploading it.

    It is theirs alone: to be kept by nobody. Nothing may be uploaded within, by no thread, so launch and leave.
    """
    outbox = _outbox() if device.type == "cuda" else None
    if outbox is None or not 0 < tensor.nbytes <= _HALF:
        there = uploaded(tensor, device)
        with _on(device):
            yield there
        return
    with outbox.lent(tensor, device) as lent:
        yield lent


def _padded(tensor: torch.Tensor) -> int:
    """Bytes that it takes there: what follows it is aligned."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


class _Outbox:
    """Takes what is small, and has a kernel read it (:mod:`ragkv.kernels.fetch`)."""

    def __init__(self, fetch: Any) -> None:
        self._fetch = fetch
        self._memory = torch.empty(2 * _HALF, dtype=torch.uint8, pin_memory=True)
        self._words, self._bytes = self._memory.view(torch.int32), self._memory.numpy()
        self._half, self._at = 0, 0
        self._streams: set[torch.cuda.Stream] = set()
        self._read: list[list[torch.cuda.Event]] = [[], []]
        self._lock = threading.Lock()

    def upload(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> list[torch.Tensor]:
        """Into ``out``, uint8 of their padded size; returns views of it."""
        arrived, start, nbytes, device = [], 0, len(out), out.device
        with self._lock, _on(device):
            first = self._room(nbytes, device)
            for tensor in tensors:
                end = start + tensor.nbytes
                self._put(tensor, first + start)
                arrived.append(out[start:end].view(tensor.dtype).view(tensor.shape))
                start += _padded(tensor)
            self._fetch(self._words[first // 4 : (first + nbytes) // 4], out.view(torch.int32))
        return arrived

    @contextmanager
    def lent(self, tensor: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
        with self._lock, _on(device):
            first = self._room(_padded(tensor), device)
            self._put(tensor, first)
            yield self._memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _put(self, tensor: torch.Tensor, first: int) -> None:
        self._bytes[first : first + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()

    def _room(self, nbytes: int, device: torch.device) -> int:
        """Where so many bytes may be written, for kernels on the current stream to read."""
        if self._at + nbytes > (self._half + 1) * _HALF:
            self._read[self._half] = [stream.record_event() for stream in self._streams]
            self._streams.clear()
            self._half = 1 - self._half
            self._at = self._half * _HALF
            for event in self._read[self._half]:
                event.synchronize()
        self._streams.add(torch.cuda.current_stream(device))
        start, self._at = self._at, self._at + nbytes
        return start


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the thread's own device, whatever they are given."""
    own = device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device()
    return nullcontext() if own else torch.cuda.device(device)


@cache
def _outbox() -> _Outbox | None:
    try:
        from ragkv.kernels.fetch import fetch  # needs Triton
    except ImportError:
        return None
    return _Outbox(fetch)


def copy_over(targets: Numbers, sources: Numbers, sizes: Numbers, stream: torch.cuda.Stream) -> None:
    """Have the copy engine bring ``sizes`` bytes, which broadcast to all of them, from page-locked memory at each of
    ``sources`` to the CUDA device's at ``targets``, in the order of ``stream``; all of it stays as it is until then.

    A tensor's ``copy_`` takes the host several times as long: more than the link does, for slabs of short chunks.

    Raises:
        RuntimeError: the driver refused.
    """
    batch = _batch()
    if batch is None:
        copy_each(targets, sources, sizes, stream)
        return
    table = np.empty((3, *targets.shape), np.int64)
    table[0], table[1], table[2] = targets, sources, sizes
    first, row = table.ctypes.data, table.strides[0]
    attributes, index, failed = _Attributes(source_order=_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
    refs = (ctypes.byref(attributes), ctypes.byref(index), 1, ctypes.byref(failed))
    _check(batch(first, first + row, first + 2 * row, targets.size, *refs, stream.cuda_stream))


def copy_each(targets: Numbers, sources: Numbers, sizes: Numbers, stream: torch.cuda.Stream) -> None:
    """:func:`copy_over`, one call each: for drivers before CUDA 12.8."""
    copy, handle = driver().cuMemcpyHtoDAsync_v2, stream.cuda_stream
    for target, source, nbytes in np.broadcast(targets, sources, sizes):
        _check(copy(int(target), int(source), int(nbytes), handle))


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"copying to the device failed with CUDA error {error}")


_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """For calls that torch has no name for."""
    library = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_void_p
    library.cuMemcpyHtoDAsync_v2.argtypes = (address, address, ctypes.c_size_t, address)
    return library


@cache
def _batch() -> Any:
    """The driver's call for many copies, None where it is too old for it."""
    try:
        call = driver().cuMemcpyBatchAsync
    except AttributeError:
        return None
    address = ctypes.c_void_p
    call.argtypes = (address, address, address, ctypes.c_size_t, address, address, ctypes.c_size_t, address, address)
    return call
