"""How many blocks the pool has, where settings do not say."""

from __future__ import annotations

import os

import torch

from ragkv.config import Settings
from ragkv.errors import ConfigError
from ragkv.paged import BLOCK_TOKENS, block_bytes
from ragkv.runner import ModelRunner

_GPU_SHARE = 0.5
_CPU_SHARE = 1 / 16
_HOST_SHARE = 1 / 8
_MOST_HOST_BYTES = 16 * 2**30


def pool_sizes(settings: Settings, runner: ModelRunner) -> tuple[int, int]:
    """Blocks on the device and in RAM.

    Raises:
        ConfigError: not even a short conversation would fit.
    """
    size, shape = block_bytes(runner.shape), runner.shape
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if settings.pool_bytes is not None:
        wanted = settings.pool_bytes
    elif runner.device.type == "cuda":
        wanted = int(_GPU_SHARE * torch.cuda.mem_get_info(runner.device)[0])
    else:
        # No more than everybody's longest conversation takes.
        longest = size * -(-runner.max_positions // BLOCK_TOKENS)
        wanted = min(int(_CPU_SHARE * memory), settings.max_running * longest)
    blocks = wanted // size
    if blocks < 2:
        raise ConfigError(
            f"setting 'pool_bytes': {wanted} hold no conversation of this model, whose {BLOCK_TOKENS} tokens take "
            f"{size} bytes in {shape.layers} layers",
            setting="pool_bytes",
            value=wanted,
        )
    host = settings.swap_bytes
    if host is None:
        host = min(int(_HOST_SHARE * memory), _MOST_HOST_BYTES)
        if runner.device.type != "cuda":
            host = min(host, 2 * blocks * size)
    return blocks, host // size
