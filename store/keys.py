"""The content address of a chunk's KV: equal inputs give equal keys in every process and on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from blake3 import blake3

FORMAT_VERSION = 1
"""Version of keys and entry files. A new version never reads, and never matches, the old one's entries."""

KEY_BYTES = 32


def chunk_key(
    *,
    model: str,
    tokenizer: str,
    dtype: str,
    codec: str,
    context_policy: str,
    context: Sequence[int],
    tokens: Sequence[int],
    salt: bytes = b"",
) -> bytes:
    """Return the 32-byte blake3 key of a chunk's KV.

    ``model`` and ``tokenizer`` are fingerprints; ``context`` are the token ids the chunk was encoded behind,
    ``tokens`` its own. ``salt`` is a tenant's secret: without it one tenant's chunk never matches another's.
    """
    fields = [model, tokenizer, dtype, codec, context_policy]
    parts = [field.encode() for field in fields] + [_ids(context), _ids(tokens), salt]
    digest = blake3(b"ragkv chunk key\0" + FORMAT_VERSION.to_bytes(4, "little"))
    for part in parts:
        # The length in front keeps two different splits of the same bytes apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _ids(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<i8").tobytes()
