"""Names for the KV of a block of tokens, made of all that it depends on: the tokens up to its end, who may share it,
and whether all of it was computed.

KV that was blended is approximate. From its first approximate token on, a conversation's blocks carry a secret of the
conversation's own in their names, so that its next turn finds them and nobody else ever takes them for exact.
"""

from __future__ import annotations

import secrets
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from blake3 import blake3

ALL = sys.maxsize
_BYTES = 16


@dataclass(frozen=True)
class Lineage:
    """How the KV of one conversation came about.

    Attributes:
        root: who may share it; conversations of other roots never find it.
        exact: leading tokens whose KV is what a full prefill computes.
        private: what stands in the names of all others.
    """

    root: bytes = b""
    exact: int = ALL
    private: bytes = field(default_factory=lambda: secrets.token_bytes(_BYTES))

    def until(self, exact: int) -> Lineage:
        """The same, with no more than ``exact`` exact tokens."""
        return replace(self, exact=min(exact, self.exact))

    def names(self, ids: Sequence[int], block_tokens: int, known: Sequence[bytes] = ()) -> list[bytes]:
        """A name for every whole block of ``ids``; ``known`` are those of the first ones."""
        names = list(known)
        tokens = memoryview(array("Q", ids[len(names) * block_tokens :])).cast("B")
        size = block_tokens * 8
        for start in range(0, len(tokens) - size + 1, size):
            names.append(self._name(names[-1] if names else self.root, tokens[start : start + size], len(names) + 1))
        return names

    def _name(self, parent: bytes, tokens: memoryview, blocks: int) -> bytes:
        secret = self.private if blocks * len(tokens) // 8 > self.exact else b""
        return blake3(b"%d %d " % (len(parent), len(secret)) + parent + secret + tokens).digest(_BYTES)
