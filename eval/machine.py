"""What a committed result says of where it comes from."""

from __future__ import annotations

import os
import platform
import statistics
import timeit
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from ragkv.version import __version__


def device_name(device: torch.device) -> str:
    """Of a CPU with the threads that compute, which may be fewer than its cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"


def environment(device: torch.device) -> dict[str, Any]:
    """Date, device and versions, as JSON-able values."""
    return {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "gpu": device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "host_loop_us": host_loop_us(),
        "versions": {
            "python": platform.python_version(),
            "ragkv": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def host_loop_us() -> float:
    """Microseconds of 1,000 steps in Python: where the host is the limit, results differ by it."""
    return round(1e6 * statistics.median(timeit.repeat("[i * 2 for i in range(1000)]", number=1, repeat=200)), 1)
