"""Freed memory is kept where tensors are computed on a CPU: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# What a layer asks for: blocks larger than glibc keeps by itself, and than the arena of a thread has.
SCRIPT = """
import resource, threading
import torch
from torch.nn.functional import linear, silu
from ragkv.host_memory import keep_freed

print(keep_freed())
gate, up, down = torch.ones(4096, 8), torch.ones(4096, 8), torch.ones(8, 4096)

def faults(rows):
    for turn in range(24):
        if turn == 14:  # it takes some to settle
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        hidden = torch.ones(rows, 8)
        linear(silu(linear(hidden, gate)) * linear(hidden, up), down)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for rows in (512, 3072, 6144):
    faults(rows)
    thread = threading.Thread(target=faults, args=(rows,))
    thread.start()
    thread.join()
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not take it")


def run(**environment: str) -> list[str]:
    unset = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX"}
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=clean | environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_freed_memory_is_used_again_without_being_mapped_anew():
    kept, *faults = run()
    assert kept == "True"
    assert max(map(int, faults)) < 5000  # ten blocks of 8 MiB, the smallest, have 20,480 pages


def test_who_has_set_the_allocator_is_left_alone():
    kept, *faults = run(MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert kept == "False"
    assert max(map(int, faults)) > 10_000
