"""Page-locked memory for the store's RAM tier."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.store.buffers import HUGE_PAGE, aligned_empty

log = logging.getLogger("ragkv")

_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable and -Mapped: all devices, and their kernels, can read it
# Numbers of the huge pages that are locked. Regions of the store's pool are whole ones.
_LOCKED: set[int] = set()


def is_page_locked(address: int, nbytes: int) -> bool:
    """Whether :class:`PageLocking` has locked this memory, so that a kernel may read it.

    Other page-locked memory is not known of.
    """
    first, last = address // HUGE_PAGE, (address + nbytes - 1) // HUGE_PAGE
    return first in _LOCKED and (first == last or all(page in _LOCKED for page in range(first + 1, last + 1)))


def are_page_locked(pages: frozenset[int]) -> bool:
    """:func:`is_page_locked` for all memory in huge pages of these numbers."""
    return pages <= _LOCKED


class PageLocking:
    """``ChunkStore(ram_allocate=PageLocking(device))``: uint8 arrays that begin on a page, page-locked as long as the
    system allows it; ordinary ones from then on, with one warning.

    Ordinary memory is locked, rather than taken from torch's pinned allocator: that one rounds up to powers of two, so
    that the RAM tier would take up to twice its ``ram_bytes``, and never gives any back.

    To be called on threads that launch no kernels, such as the store's and its writers': CUDA keeps a refusal for the
    thread's next launch to fail with, and torch has no call to take it away.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._refused = False

    def __call__(self, nbytes: int) -> NDArray[np.uint8]:
        memory = aligned_empty(nbytes)
        if not self._refused:
            self._lock(memory)
        return memory

    def _lock(self, memory: NDArray[np.uint8]) -> None:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.ctypes.data
        with torch.cuda.device(self._device):
            error = int(cudart.cudaHostRegister(address, memory.nbytes, _PORTABLE_AND_MAPPED))
        if error:
            self._refuse(error)
            return
        # To the array that owns the bytes: views outlive ``memory``.
        owner = memory if memory.base is None else memory.base
        pages = range(-(-address // HUGE_PAGE), (address + memory.nbytes) // HUGE_PAGE)
        _LOCKED.update(pages)
        weakref.finalize(owner, _unlock, cudart, address, pages).atexit = False

    def _refuse(self, error: int) -> None:
        if not self._refused:
            log.warning(
                "the system does not page-lock more memory (CUDA error %d); the RAM tier goes on in ordinary memory. "
                "Lower ram_bytes if others need page-locked memory",
                error,
            )
        self._refused = True


def _unlock(cudart: Any, address: int, pages: range) -> None:
    _LOCKED.difference_update(pages)
    cudart.cudaHostUnregister(address)
