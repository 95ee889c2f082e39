"""How fast KV is encoded into fewer bytes, and decoded again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.store import Geometry
from ragkv.store.codecs import CODECS, Codec


def measure_codecs(geometry: Geometry, tokens: int, *, passes: int) -> dict[str, dict[str, float]]:
    """Medians over the passes, layer by layer on one thread, in GB/s of the KV as the model has it."""
    shape = (2, tokens, geometry.kv_heads, geometry.head_dim)
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal(shape, np.float32).astype(geometry.numpy_dtype) for _ in range(geometry.layers)]
    gb = sum(layer.nbytes for layer in layers) / 1e9
    figures: dict[str, dict[str, float]] = {}
    for name, codec in CODECS.items():
        if name == "raw":
            continue
        slabs = [_joined(codec.encode(*layer)) for layer in layers]
        encode = [_seconds(partial(_encode, codec), layers) for _ in range(passes)]
        decode = [_seconds(partial(codec.decode, geometry=geometry, tokens=tokens), slabs) for _ in range(passes)]
        figures[name] = {
            "encode_gbps": gb / statistics.median(encode),
            "decode_gbps": gb / statistics.median(decode),
        }
    return figures


def _encode(codec: Codec, layer: NDArray[Any]) -> object:
    return codec.encode(*layer)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def _seconds(work: Callable[[Any], object], things: Sequence[Any]) -> float:
    started = time.perf_counter()
    for thing in things:
        work(thing)
    return time.perf_counter() - started
