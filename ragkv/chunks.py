"""A document's chunks as the model sees them: token ids, document context, store keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ragkv.store import chunk_key
from ragkv.tokenizer import Tokenizer, chunk_text
from ragkv.types import ContextPolicy

# Tokens of chunks that requests named last, and of their contexts, at 8 bytes each. What makes a chunk's key hashes its
# context too, for every request.
_REMEMBERED = 1 << 22
_USUAL = 512  # tokens of a chunk


@dataclass(frozen=True)
class ChunkTokens:
    """One chunk, tokenised.

    Attributes:
        ids: its own tokens.
        context: tokens of the whole chunks that precede it in its document and that its stored KV is encoded
            behind (without BOS); empty when it is encoded alone.
        context_chunks: how many chunks these are.
        policy: under which it is encoded.
        key: its key in the chunk store.
        codec: it is stored with.
    """

    ids: tuple[int, ...]
    context: tuple[int, ...]
    context_chunks: int
    policy: ContextPolicy
    key: bytes
    codec: str = "raw"

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """``ids``, to calculate with; not to be written."""
        return np.array(self.ids, np.int64)


@dataclass(frozen=True)
class EncodeGroup:
    """Chunks of one document that one forward pass can encode: same context start, in order.

    ``lead`` is what stands in front of the first of them, BOS included; ``parts`` are the chunks' ids from there on;
    ``keys`` has, for each part, the key to store it under, or None when it is only context.
    """

    lead: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    keys: tuple[bytes | None, ...]
    policy: ContextPolicy

    @property
    def tokens(self) -> int:
        return len(self.lead) + sum(map(len, self.parts))

    @property
    def wanted(self) -> int:
        return sum(key is not None for key in self.keys)

    @property
    def wanted_lengths(self) -> list[int]:
        """Tokens of each wanted chunk."""
        return [len(part) for part, key in zip(self.parts, self.keys, strict=True) if key is not None]


class ChunkTokenizer:
    """Turns a document's chunk texts into :class:`ChunkTokens` for one model and one context policy.

    ``salt`` is a secret in every key: under another one, nothing that is stored is found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_fingerprint: str,
        dtype: str,
        context_tokens: int,
        codec: str = "raw",
        salt: bytes = b"",
    ) -> None:
        self._tokenizer, self._limit = tokenizer, context_tokens
        self._model, self._dtype, self._codec = model_fingerprint, dtype, codec
        self._salt = salt
        self._remembered = lru_cache(maxsize=_REMEMBERED // (_USUAL + context_tokens))(self._tokens)

    def document(self, texts: Sequence[str], policy: ContextPolicy) -> list[ChunkTokens]:
        """Tokens and keys of all chunks of a document, given their texts in order."""
        return [self._tokens(self._run(texts, index, policy), policy) for index in range(len(texts))]

    def chunk(self, texts: Sequence[str], index: int, policy: ContextPolicy) -> ChunkTokens:
        """Tokens and key of one chunk of a document, which will probably be asked for again."""
        return self._remembered(self._run(texts, index, policy), policy)

    def _run(self, texts: Sequence[str], index: int, policy: ContextPolicy) -> tuple[str, ...]:
        """A chunk behind its context.

        That is the longest run of whole chunks before it within the token limit: whole ones, so that an edit changes
        only the keys of its neighbours.
        """
        room = self._limit if policy == "document" else 0
        start = index
        while start > 0 and (taken := len(self._ids(texts[start - 1]))) <= room:
            room -= taken
            start -= 1
        return tuple(texts[start : index + 1])

    def _tokens(self, texts: tuple[str, ...], policy: ContextPolicy) -> ChunkTokens:
        """Of the last of ``texts``, behind all others."""
        *before, ids = map(self._ids, texts)
        context = tuple(token for chunk in before for token in chunk)
        key = chunk_key(
            model=self._model,
            tokenizer=self._tokenizer.fingerprint,
            dtype=self._dtype,
            codec=self._codec,
            context_policy=policy,
            context=(*self._tokenizer.bos, *context),
            tokens=ids,
            salt=self._salt,
        )
        return ChunkTokens(ids, context, len(before), policy, key, self._codec)

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.plain(chunk_text(text))

    def single(self, tokens: ChunkTokens) -> EncodeGroup:
        """The group that encodes one chunk on its own, behind its context."""
        return EncodeGroup((*self._tokenizer.bos, *tokens.context), (tokens.ids,), (tokens.key,), tokens.policy)

    def groups(self, chunks: Sequence[ChunkTokens], missing: set[bytes]) -> list[EncodeGroup]:
        """The fewest forward passes that encode the ``missing`` chunks of one document.

        Chunks whose context starts at the same chunk share a pass: each sees in it exactly its own context.
        Equal chunks, which share a key, are encoded once.
        """
        groups: list[EncodeGroup] = []
        missing = set(missing)
        first = 0
        while first < len(chunks):
            start = first - chunks[first].context_chunks
            last = first
            while last + 1 < len(chunks) and last + 1 - chunks[last + 1].context_chunks == start:
                last += 1
            group = self._group(chunks[first : last + 1], missing)
            if group.wanted:
                groups.append(group)
                missing.difference_update(key for key in group.keys if key)
            first = last + 1
        return groups

    def _group(self, chunks: Sequence[ChunkTokens], missing: set[bytes]) -> EncodeGroup:
        keys: list[bytes | None] = []
        for chunk in chunks:
            keys.append(chunk.key if chunk.key in missing and chunk.key not in keys else None)
        while keys and keys[-1] is None:
            keys.pop()
        lead = (*self._tokenizer.bos, *chunks[0].context)
        return EncodeGroup(lead, tuple(c.ids for c in chunks[: len(keys)]), tuple(keys), chunks[0].policy)
