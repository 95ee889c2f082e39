"""Keeping what was freed, on a CPU: every layer asks for tensors as large as the last one's.

glibc maps a large block anew each time, and gives it back to the system when it is freed, so that its pages are faulted
in and zeroed again and again: up to a quarter of a prefill's time (docs/blending.md). Other allocators, loaded before
the process starts, may keep it too.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt's names for them
_KEPT = 1 << 30
# Whoever sets one of these knows what he wants.
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


@cache
def keep_freed() -> bool:
    """Have this process keep up to 1 GiB of freed memory for its next tensors, all threads the same. False where the C
    library does not take it, or the environment says otherwise."""
    if any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # musl, macOS
    # One arena: those of other threads hold 64 MB, and hand out nothing that is larger.
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT))
    return all(mallopt(name, value) for name, value in settings)
