"""The shape of one model's KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ragkv.errors import StoreFormatError

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one model's KV: K and V are each (tokens, kv_heads, head_dim) in every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreFormatError(
                f"KV dtype {self.dtype!r} cannot be stored; use one of {', '.join(DTYPES)}", dtype=self.dtype
            )
        for name in ("layers", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise StoreFormatError(f"geometry: {name} must be a positive integer, not {value!r}", name=name)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The element type of K and V as numpy knows it (bfloat16 through ml_dtypes)."""
        return DTYPES[self.dtype]

    def slab_bytes(self, tokens: int) -> int:
        """Bytes of one layer's K and V together, as the model has them."""
        return 2 * tokens * self.kv_heads * self.head_dim * self.numpy_dtype.itemsize
