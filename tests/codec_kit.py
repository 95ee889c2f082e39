"""K and V of one layer as tensors, and the slab that the store would have of them."""

from __future__ import annotations

import numpy as np
import torch

from ragkv.kv import KvShape
from ragkv.store import CODECS


def random_kv(shape: KvShape, tokens: int, seed: int) -> torch.Tensor:
    """(2, tokens, kv_heads, head_dim), channels and tokens of different size."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, tokens, shape.kv_heads, shape.head_dim, generator=generator)
    both[0] *= torch.randn(shape.kv_heads, shape.head_dim, generator=generator).exp()
    both[1] *= torch.randn(tokens, shape.kv_heads, 1, generator=generator).exp()
    return both.to(shape.dtype)


def encoded(both: torch.Tensor, codec: str) -> np.ndarray:
    """The bytes that the store has of K and V, each (tokens, kv_heads, head_dim)."""
    shape = KvShape(1, both.shape[2], both.shape[3], both.dtype)
    arrays = both.contiguous().view(torch.uint8).numpy().view(shape.geometry.numpy_dtype)
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in CODECS[codec].encode(*arrays)])


def decoded(slab: np.ndarray, shape: KvShape, tokens: int, codec: str) -> torch.Tensor:
    """(2, tokens, kv_heads, head_dim) by the store's own, plain decoder."""
    both = np.stack(CODECS[codec].decode(slab, shape.geometry, tokens))
    return torch.from_numpy(both.view(np.uint8)).view(shape.dtype)
