"""What is launched, captured in CUDA graphs, while other threads go on with what they do on streams of their own."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from ragkv.uploading import driver

T = TypeVar("T")
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_LOCK = threading.Lock()


@cache
def _stream(device: torch.device) -> Any:
    """Nobody else's: torch's own go round, and what others do on one that is being captured would spoil that."""
    stream = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context the thread's
        error = driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING)
    if error:
        raise RuntimeError(f"the CUDA driver makes no stream: error {error}")
    return torch.cuda.ExternalStream(stream.value, device)  # type: ignore[no-untyped-call]


@contextmanager
def capturing(device: torch.device) -> Iterator[None]:
    """On another stream, which capturing needs, behind all that was launched before; what is launched later waits for
    it. One thread at a time; and nothing is collected meanwhile, as a graph that is let go of would spoil another."""
    with _LOCK:
        stream, current = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                yield
        except BaseException:
            stream.synchronize()  # memory that it works on may be let go of now
            raise
        finally:
            if collects:
                gc.enable()
        current.wait_stream(stream)


def captured(run: Callable[[], T], pool: Any = None) -> tuple[Any, T]:
    """A graph of what ``run`` launches, and what it returns, where a replay writes. Within :func:`capturing`.

    What is compiled once must be before. Memory that is allocated on the way, and let go of, is the next graph's of
    the same ``pool`` as well, of which one graph at least must be kept.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = run()
    finally:
        graph.capture_end()
    return graph, result
